//! Which module is stored in which format, as a checkpoint's recipe says: for sizes from configuration alone, and
//! to cross-check what is stored. Loading never needs it: there, the stored tensors decide.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::config::ConfigError;
use super::json;
use super::names::Naming;
use crate::weights::{Dtype, Kind};

/// How a linear weight is stored, and whether an activation scale stands beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scheme {
    pub kind: Kind,
    /// `input_scale`: W4A4 and W8A8 checkpoints have it, weight-only ones do not.
    pub input_scale: bool,
}

impl Scheme {
    pub const BF16: Scheme = Scheme { kind: Kind::BF16, input_scale: false };

    /// A name of ModelOpt's `quant_algo`.
    fn of_algorithm(field: &str, name: &str) -> Result<Self, ConfigError> {
        let (kind, input_scale) = match name {
            "FP8" => (Kind::Fp8, true),
            "W8A16_FP8" => (Kind::Fp8, false),
            "NVFP4" => (Kind::Nvfp4, true),
            "W4A16_NVFP4" | "NVFP4_W4A16" => (Kind::Nvfp4, false),
            "BF16" => (Kind::BF16, false),
            other => {
                return Err(ConfigError::Unsupported {
                    field: field.into(),
                    expected: "FP8, NVFP4, W4A16_NVFP4 or MIXED_PRECISION",
                    got: other.into(),
                });
            }
        };
        Ok(Scheme { kind, input_scale })
    }
}

/// Module to [`Scheme`].
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// What no entry names.
    unlisted: Scheme,
    /// Modules by canonical name; an entry covers everything below it too.
    exact: HashMap<String, Scheme>,
    /// Patterns, the first that fits.
    rules: Vec<Rule>,
    /// Whether the recipe wants the K/V cache in FP8.
    pub kv_cache_fp8: bool,
    /// Stored type of the router's weight in the body.
    pub gate: Dtype,
    /// Whether the attention layers of the body have `k_scale` and `v_scale`.
    pub kv_scales: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Rule {
    /// Fits a canonical name, or where `layers` is given the part behind `layers.L.mixer.`.
    pattern: String,
    layers: Option<Layers>,
    scheme: Scheme,
}

#[derive(Debug, Clone, PartialEq)]
enum Layers {
    Only(Vec<usize>),
    AllBut(Vec<usize>),
}

impl Recipe {
    /// The same scheme for every linear weight.
    pub fn uniform(kind: Kind) -> Self {
        Recipe {
            unlisted: Scheme { kind, input_scale: false },
            exact: HashMap::new(),
            rules: Vec::new(),
            kv_cache_fp8: false,
            gate: Dtype::BF16,
            kv_scales: false,
        }
    }

    /// Every format that some weight may be stored in.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> {
        let rules = self.rules.iter().map(|rule| rule.scheme);
        self.exact.values().copied().chain(rules).chain([self.unlisted]).map(|scheme| scheme.kind)
    }

    /// How `module` is stored. Any checkpoint's prefix is accepted. Embeddings, convolutions, the router and norms
    /// are no linears to a recipe: they are not asked for.
    pub fn scheme(&self, module: &str) -> Scheme {
        let name = Naming::canonical(module);
        let mut ancestor = name;
        loop {
            if let Some(scheme) = self.exact.get(ancestor) {
                return *scheme;
            }
            match ancestor.rsplit_once('.') {
                Some((parent, _)) => ancestor = parent,
                None => break,
            }
        }
        let in_layer = split_layer(name);
        let fits = |rule: &&Rule| match (&rule.layers, in_layer) {
            (None, _) => glob(&rule.pattern, name),
            (Some(Layers::Only(list)), Some((layer, rest))) => {
                list.contains(&layer) && glob(&rule.pattern, rest)
            }
            (Some(Layers::AllBut(list)), Some((layer, rest))) => {
                !list.contains(&layer) && glob(&rule.pattern, rest)
            }
            (Some(_), None) => false,
        };
        self.rules.iter().find(fits).map_or(self.unlisted, |rule| rule.scheme)
    }

    /// The recipe of a checkpoint folder: `quantization_config` of config.json wins over `hf_quant_config.json`;
    /// with neither, nothing is quantised.
    pub fn of_checkpoint(config: &[u8], hf_quant_config: Option<&[u8]>) -> Result<Self, ConfigError> {
        let parse =
            |file, bytes| json::parse(bytes).map_err(|e| ConfigError::Json { file, reason: e.to_string() });
        let config = parse("config.json", config)?;
        if let Some(outer) = config.as_object() {
            for place in [outer, super::config::language_model(outer)] {
                if let Some(Value::Object(own)) = json::field(place, "quantization_config") {
                    return Self::from_object(own);
                }
            }
        }
        let Some(bytes) = hf_quant_config else { return Ok(Self::uniform(Kind::BF16)) };
        let file = parse("hf_quant_config.json", bytes)?;
        match file.get("quantization").unwrap_or(&file) {
            Value::Object(own) => Self::from_object(own),
            other => Err(ConfigError::Invalid {
                field: "hf_quant_config.json".into(),
                expected: "an object".into(),
                got: json::describe(other),
            }),
        }
    }

    /// `quantization_config`, or `quantization` of hf_quant_config.json.
    fn from_object(own: &Map<String, Value>) -> Result<Self, ConfigError> {
        let text = |key: &str| json::field(own, key).and_then(Value::as_str);
        if let Some(method) = text("quant_method")
            && !matches!(method, "modelopt" | "modelopt_fp4" | "modelopt_mixed" | "compressed-tensors")
        {
            return Err(ConfigError::Unsupported {
                field: "quantization_config.quant_method".into(),
                expected: "modelopt or compressed-tensors",
                got: method.into(),
            });
        }
        let mut recipe = Self::uniform(Kind::BF16);
        recipe.kv_cache_fp8 = text("kv_cache_quant_algo").is_some_and(|a| a.eq_ignore_ascii_case("fp8"))
            || json::field(own, "kv_cache_scheme")
                .is_some_and(|s| s.get("num_bits") == Some(&Value::from(8)));
        for key in ["exclude_modules", "ignore"] {
            for entry in strings(own, key)? {
                recipe.add(entry, Scheme::BF16)?;
            }
        }
        match text("quant_algo") {
            None | Some("MIXED_PRECISION") => {}
            Some(name) => recipe.unlisted = Scheme::of_algorithm("quant_algo", name)?,
        }
        if let Some(Value::Object(layers)) = json::field(own, "quantized_layers") {
            for (module, entry) in layers {
                let name = entry.get("quant_algo").and_then(Value::as_str).unwrap_or("no quant_algo");
                recipe.add(module, Scheme::of_algorithm(module, name)?)?;
            }
        }
        if let Some(Value::Object(groups)) = json::field(own, "config_groups") {
            for (name, group) in groups {
                recipe.add_group(name, group)?;
            }
        }
        Ok(recipe)
    }

    /// A group of `config_groups`: its targets are module names, or `Linear` for all that nothing excludes.
    fn add_group(&mut self, name: &str, group: &Value) -> Result<(), ConfigError> {
        let weights = &group["weights"];
        let kind = match (weights["num_bits"].as_u64(), weights["type"].as_str()) {
            (Some(4), Some("float")) => Kind::Nvfp4,
            (Some(8), Some("float")) => Kind::Fp8,
            (bits, kind) => {
                return Err(ConfigError::Unsupported {
                    field: format!("config_groups.{name}.weights"),
                    expected: "4-bit or 8-bit float",
                    got: format!("{bits:?} {kind:?}"),
                });
            }
        };
        let scheme = Scheme { kind, input_scale: !group["input_activations"].is_null() };
        let targets = group.as_object().map(|g| strings(g, "targets")).transpose()?.unwrap_or_default();
        for target in targets {
            match target {
                "Linear" => self.unlisted = scheme,
                module => self.add(module, scheme)?,
            }
        }
        Ok(())
    }

    /// An entry of a list or map: a plain name, a glob, or `re:` with what a glob can say.
    fn add(&mut self, entry: &str, scheme: Scheme) -> Result<(), ConfigError> {
        let pattern = match entry.strip_prefix("re:") {
            Some(expression) => glob_of_expression(expression).ok_or_else(|| ConfigError::Unsupported {
                field: "a pattern of the quantization config".into(),
                expected: "plain names, globs, and expressions of .* and \\.",
                got: entry.into(),
            })?,
            None => entry.to_string(),
        };
        let name = Naming::canonical(&pattern);
        if name.contains('*') {
            self.rules.push(Rule { pattern: name.into(), layers: None, scheme });
        } else {
            self.exact.insert(name.into(), scheme);
        }
        Ok(())
    }

    /// Our own notation in `models/<name>/quantization.json`: rules over layer lists, the first that fits.
    pub fn from_compact(text: &str) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::Json { file: "quantization.json", reason };
        let compact: Compact = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let mut recipe = Self::uniform(Kind::BF16);
        recipe.unlisted = Scheme::of_algorithm("unlisted", &compact.unlisted)?;
        recipe.kv_cache_fp8 = compact.kv_cache.is_some_and(|k| k == "FP8");
        recipe.kv_scales = compact.kv_scales;
        recipe.gate = compact.gate;
        for rule in compact.rules {
            let scheme = Scheme::of_algorithm("format", &rule.format)?;
            let layers = match rule.layers {
                None => None,
                Some(Value::Array(list)) => {
                    Some(Layers::Only(indices(&list).ok_or_else(|| bad("layers".into()))?))
                }
                Some(_) => Some(Layers::AllBut(rule.except)),
            };
            for pattern in rule.modules {
                recipe.rules.push(Rule { pattern, layers: layers.clone(), scheme });
            }
        }
        Ok(recipe)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Compact {
    #[serde(rename = "about")]
    _about: String,
    unlisted: String,
    kv_cache: Option<String>,
    gate: Dtype,
    kv_scales: bool,
    rules: Vec<CompactRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompactRule {
    modules: Vec<String>,
    /// A list of layers, or "all".
    layers: Option<Value>,
    #[serde(default)]
    except: Vec<usize>,
    format: String,
}

fn indices(list: &[Value]) -> Option<Vec<usize>> {
    list.iter().map(|v| v.as_u64().map(|n| n as usize)).collect()
}

fn strings<'a>(map: &'a Map<String, Value>, key: &str) -> Result<Vec<&'a str>, ConfigError> {
    let invalid = |got| ConfigError::Invalid { field: key.into(), expected: "a list of strings".into(), got };
    match json::field(map, key) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => {
            list.iter().map(|v| v.as_str().ok_or_else(|| invalid(json::describe(v)))).collect()
        }
        Some(other) => Err(invalid(json::describe(other))),
    }
}

/// `layers.12.mixer.in_proj` as (12, `in_proj`).
fn split_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("layers.")?.split_once(".mixer.")?;
    Some((layer.parse().ok()?, rest))
}

/// `.*` becomes `*` and `\.` a point; anchors go; `None` where the expression says more than a glob can.
fn glob_of_expression(expression: &str) -> Option<String> {
    let inner = expression.trim_start_matches('^').trim_end_matches('$');
    let glob = inner.replace(".*", "*").replace("\\.", ".");
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '*' | '-');
    glob.chars().all(plain).then_some(glob)
}

/// Whether `*` in the pattern can stand for something (also nothing, also points) so that it spells `name`.
fn glob(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = pieces.next_back() else { return rest.is_empty() };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FP8: Scheme = Scheme { kind: Kind::Fp8, input_scale: true };
    const NVFP4: Scheme = Scheme { kind: Kind::Nvfp4, input_scale: true };
    const W4A16: Scheme = Scheme { kind: Kind::Nvfp4, input_scale: false };

    #[track_caller]
    fn check(recipe: &Recipe, expected: &[(&str, Scheme)]) {
        for (module, scheme) in expected {
            assert_eq!(recipe.scheme(module), *scheme, "{module}");
        }
    }

    fn of(config: Value, hf: Option<Value>) -> Result<Recipe, ConfigError> {
        let hf = hf.map(|v| v.to_string());
        Recipe::of_checkpoint(config.to_string().as_bytes(), hf.as_deref().map(str::as_bytes))
    }

    #[test]
    fn nanos_file_excludes_exact_names() {
        let file = json!({
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quantization": {
                "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
                "exclude_modules": ["lm_head", "backbone.layers.4.mixer.in_proj", "backbone.layers.5.mixer.q_proj"],
            },
        });
        let recipe = of(json!({}), Some(file)).unwrap();
        assert!(recipe.kv_cache_fp8);
        check(
            &recipe,
            &[
                ("lm_head", Scheme::BF16),
                ("backbone.layers.4.mixer.in_proj", Scheme::BF16),
                // Other prefixes are the same module; a longer number is not.
                ("model.layers.5.mixer.q_proj", Scheme::BF16),
                ("language_model.backbone.layers.5.mixer.q_proj", Scheme::BF16),
                ("backbone.layers.45.mixer.q_proj", NVFP4),
                ("backbone.layers.0.mixer.in_proj", NVFP4),
            ],
        );
    }

    #[test]
    fn maps_patterns_and_ancestors() {
        let recipe = of(
            json!({"quantization_config": {
                "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
                "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"},
                "quantized_layers": {
                    "backbone.layers.1.mixer.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
                    "backbone.layers.3.mixer.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
                    "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
                },
            }}),
            // config.json wins.
            Some(json!({"quantization": {"quant_algo": "FP8"}})),
        )
        .unwrap();
        assert!(recipe.kv_cache_fp8);
        check(
            &recipe,
            &[
                ("backbone.layers.1.mixer.experts.0.up_proj", NVFP4),
                ("backbone.layers.1.mixer.experts.0.down_proj", Scheme::BF16),
                ("backbone.layers.3.mixer.experts.17.down_proj", W4A16),
                ("backbone.layers.0.mixer.in_proj", FP8),
                ("lm_head", Scheme::BF16),
            ],
        );
        let recipe = of(
            json!({"quantization_config": {"quant_algo": "FP8", "ignore": ["mtp*", "*.q_proj", "re:.*shared_experts.*"]}}),
            None,
        )
        .unwrap();
        check(
            &recipe,
            &[
                ("mtp.layers.0.eh_proj", Scheme::BF16),
                ("backbone.layers.5.mixer.q_proj", Scheme::BF16),
                ("backbone.layers.1.mixer.shared_experts.up_proj", Scheme::BF16),
                ("backbone.layers.1.mixer.experts.0.up_proj", FP8),
            ],
        );
    }

    #[test]
    fn compressed_tensors_groups_are_read() {
        let group = json!({"targets": ["Linear"], "input_activations": null,
                           "weights": {"num_bits": 4, "type": "float", "group_size": 16}});
        let recipe = of(
            json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                                           "ignore": ["lm_head"], "config_groups": {"group_0": group}}}),
            None,
        )
        .unwrap();
        check(&recipe, &[("lm_head", Scheme::BF16), ("model.layers.0.mixer.in_proj", W4A16)]);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (config, message) in [
            (json!({"quant_method": "gptq"}), "quant_method = gptq"),
            (json!({"quant_algo": "INT4_AWQ"}), "quant_algo = INT4_AWQ"),
            (json!({"quantized_layers": {"lm_head": {}}}), "lm_head = no quant_algo"),
            (json!({"ignore": "lm_head"}), "ignore: expected a list of strings"),
            (json!({"ignore": ["re:layers\\.(1|2)"]}), "re:layers"),
            (
                json!({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}),
                "config_groups.a.weights",
            ),
        ] {
            let error = of(json!({"quantization_config": config}), None).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert_eq!(of(json!({}), None).unwrap(), Recipe::uniform(Kind::BF16));
    }

    #[test]
    fn globs() {
        for (pattern, name, fits) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("mtp*", "mtp.layers.0", true),
            ("*.conv1d", "layers.0.mixer.conv1d", true),
            ("*.conv1d", "layers.0.mixer.conv1d.weight", false),
            ("layers.*.mixer.*_proj", "layers.12.mixer.in_proj", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("*b*b*", "abab", true),
            ("*b*b*", "ab", false),
            ("*", "", true),
        ] {
            assert_eq!(glob(pattern, name), fits, "{pattern} {name}");
        }
    }
}
