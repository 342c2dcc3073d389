//! Which web pages may talk to us.
//!
//! An open local server is a tool in the hands of every page its owner visits, unless it asks where a page
//! comes from. So without a key only pages of this very machine and desktop apps may; with one, whoever has it.

use axum::http::{HeaderName, HeaderValue, Method};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

/// `--allowed-origins`, `--allowed-methods`, `--allowed-headers`, `--allow-credentials`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CorsOptions {
    /// `None`: loopback and app schemes without a key, everyone with one. `*` means everyone.
    pub origins: Option<Vec<String>>,
    pub methods: Option<Vec<String>>,
    pub headers: Option<Vec<String>>,
    pub credentials: bool,
}

impl CorsOptions {
    /// Errors: a method or header that cannot be one.
    pub fn check(&self) -> Result<(), String> {
        for method in named(&self.methods) {
            Method::from_bytes(method.as_bytes()).map_err(|_| format!("`{method}` is not an HTTP method"))?;
        }
        for header in named(&self.headers) {
            HeaderName::from_bytes(header.as_bytes())
                .map_err(|_| format!("`{header}` is not a header name"))?;
        }
        Ok(())
    }

    pub fn layer(&self, has_keys: bool) -> CorsLayer {
        CorsLayer::new()
            .allow_origin(self.allow_origin(has_keys))
            .allow_methods(self.allow_methods())
            .allow_headers(self.allow_headers())
            .allow_credentials(self.credentials)
    }

    /// Whether a page of `origin` may call.
    pub fn allows(&self, origin: &HeaderValue, has_keys: bool) -> bool {
        match &self.origins {
            None => has_keys || is_local(origin),
            Some(origins) => {
                origins.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes())
            }
        }
    }

    fn allow_origin(&self, has_keys: bool) -> AllowOrigin {
        match &self.origins {
            None if has_keys => self.everyone(),
            None => AllowOrigin::predicate(|origin, _| is_local(origin)),
            Some(origins) if origins.iter().any(|origin| origin == "*") => self.everyone(),
            Some(origins) => {
                let origins = origins.clone();
                AllowOrigin::predicate(move |origin, _| {
                    origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes())
                })
            }
        }
    }

    /// With credentials the origin is echoed: browsers refuse `*` then.
    fn everyone(&self) -> AllowOrigin {
        if self.credentials { AllowOrigin::mirror_request() } else { AllowOrigin::any() }
    }

    fn allow_methods(&self) -> AllowMethods {
        let methods: Vec<Method> =
            named(&self.methods).filter_map(|method| Method::from_bytes(method.as_bytes()).ok()).collect();
        if methods.is_empty() { AllowMethods::mirror_request() } else { AllowMethods::list(methods) }
    }

    fn allow_headers(&self) -> AllowHeaders {
        let headers: Vec<HeaderName> = named(&self.headers)
            .filter_map(|header| HeaderName::from_bytes(header.as_bytes()).ok())
            .collect();
        if headers.is_empty() { AllowHeaders::mirror_request() } else { AllowHeaders::list(headers) }
    }
}

/// The entries of a list that names some; none if it is absent or says `*`.
fn named(list: &Option<Vec<String>>) -> impl Iterator<Item = &String> {
    let all = list.iter().flatten().any(|entry| entry == "*");
    list.iter().flatten().filter(move |_| !all)
}

/// A page served by this machine, or a desktop app's own scheme.
fn is_local(origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    let Some((scheme, rest)) = origin.split_once("://") else { return false };
    match scheme {
        "app" | "tauri" => true,
        "http" | "https" => {
            let host = match rest.rsplit_once(':') {
                Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
                _ => rest,
            };
            matches!(host, "localhost" | "127.0.0.1" | "[::1]")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_call_is_who_is_named() {
        let check = |origins: Option<&[&str]>, has_keys, expected| {
            let origins = origins.map(|list| list.iter().map(|&origin| origin.to_owned()).collect());
            let options = CorsOptions { origins, ..CorsOptions::default() };
            let stranger = HeaderValue::from_static("https://example.com");
            assert_eq!(options.allows(&stranger, has_keys), expected, "{options:?}");
        };
        check(None, false, false);
        check(None, true, true);
        check(Some(&["*"]), false, true);
        check(Some(&["https://example.com"]), false, true);
        check(Some(&["https://example.org"]), true, false);
    }

    #[test]
    fn only_this_machine_is_local() {
        let check = |origin: &'static str, expected| {
            assert_eq!(is_local(&HeaderValue::from_static(origin)), expected, "{origin}");
        };
        check("http://localhost", true);
        check("http://localhost:3000", true);
        check("https://127.0.0.1:8443", true);
        check("http://[::1]:80", true);
        check("http://[::1]", true);
        check("app://obsidian.md", true);
        check("https://example.com", false);
        check("http://localhost.example.com", false);
        check("http://localhost:80.example.com", false);
        check("null", false);
    }
}
