//! Variables that scripts of vLLM set: each that is set and means nothing here is told once.

/// These are read, here or where they matter.
const READ: [&str; 5] = [
    "VLLM_API_KEY",
    "VLLM_LOGGING_LEVEL",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ENABLE_RESPONSES_API_STORE",
];

/// One line for each variable without effect.
pub fn told(variables: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let mut lines: Vec<String> = variables.filter(|(_, value)| !value.is_empty()).filter_map(line).collect();
    lines.sort();
    lines
}

fn line((name, value): (String, String)) -> Option<String> {
    let why = match name.as_str() {
        "CUDA_VISIBLE_DEVICES" if !matches!(value.as_str(), "-1" | "NoDevFiles") => "the CPU computes",
        "VLLM_HOST_IP" => "--host and FERROTRON_HOST say where to listen",
        name if !name.starts_with("VLLM_") || READ.contains(&name) => return None,
        name if ["GEMM", "MARLIN", "FLASHINFER", "MOE", "ATTENTION"]
            .iter()
            .any(|word| name.contains(word)) =>
        {
            "kernels are chosen for the CPU at start"
        }
        _ => "it is not known here",
    };
    Some(format!("{name} is ignored: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_for_vllm_alone_is_told() {
        let set = [
            ("VLLM_NVFP4_GEMM_BACKEND", "cutlass"),
            ("VLLM_WHATEVER", "1"),
            ("VLLM_API_KEY", "secret"),
            ("VLLM_EMPTY", ""),
            ("HOME", "/root"),
        ];
        let lines = told(set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        assert_eq!(
            lines,
            [
                "VLLM_NVFP4_GEMM_BACKEND is ignored: kernels are chosen for the CPU at start",
                "VLLM_WHATEVER is ignored: it is not known here",
            ]
        );
    }
}
