//! The query of a request's address. What is not known in it is ignored.

use super::error::ApiError;
use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;

/// Names and values, in order; a name may come several times.
pub struct Pairs(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Pairs {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let pairs = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let Query(pairs) =
            pairs.map_err(|error| ApiError::malformed(format!("The query cannot be read: {error}")))?;
        Ok(Self(pairs))
    }
}

impl Pairs {
    /// The last value of `name`; an empty one is none.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).last()
    }

    pub fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        let named = self.0.iter().filter(move |(given, value)| given == name && !value.is_empty());
        named.map(|(_, value)| value.as_str())
    }

    /// Errors: 400 if it is neither true nor false.
    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some("true" | "1") => Ok(Some(true)),
            Some("false" | "0") => Ok(Some(false)),
            Some(other) => {
                Err(ApiError::bad(name, format!("`{name}` must be true or false, got `{other}`.")))
            }
        }
    }
}
