//! TLS, from the files that certificates come in.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

/// Why a door cannot speak TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path} cannot be read: {error}")]
    Read { path: PathBuf, error: io::Error },
    #[error("{path}: expected {expected} in PEM form, got {got}")]
    Pem { path: PathBuf, expected: &'static str, got: String },
    #[error("the certificate and its key do not serve: {0}")]
    Config(String),
}

/// Where the certificates lie.
#[derive(Debug, Clone, PartialEq)]
pub struct TlsFiles {
    /// The server's own, then those up to the authority's.
    pub certificates: PathBuf,
    /// `None`: in the same file.
    pub key: Option<PathBuf>,
    /// Authorities of which clients may show a certificate.
    pub authorities: Option<PathBuf>,
    /// Whether a client without one is sent away.
    pub required: bool,
}

/// Speaks TLS 1.2 and 1.3 with who connects.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

impl Tls {
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let chain = certificates(&files.certificates)?;
        let key = key(files.key.as_deref().unwrap_or(&files.certificates))?;
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone());
        let config = config.with_safe_default_protocol_versions().map_err(unusable)?;
        let config = match &files.authorities {
            None => config.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(unusable)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = if files.required { verifier } else { verifier.allow_unauthenticated() };
                let verifier = verifier.build().map_err(|error| TlsError::Config(error.to_string()))?;
                config.with_client_cert_verifier(verifier)
            }
        };
        let mut config = config.with_single_cert(chain, key).map_err(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    pub fn acceptor(&self) -> &TlsAcceptor {
        &self.0
    }
}

fn unusable(error: rustls::Error) -> TlsError {
    TlsError::Config(error.to_string())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |error| wrong(path, "certificates", error);
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    match found.is_empty() {
        true => Err(wrong(pem::Error::NoItemsFound)),
        false => Ok(found),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| wrong(path, "a private key", error))
}

fn wrong(path: &Path, expected: &'static str, error: pem::Error) -> TlsError {
    let path = path.to_owned();
    match error {
        pem::Error::Io(error) => TlsError::Read { path, error },
        pem::Error::NoItemsFound => TlsError::Pem { path, expected, got: "none".to_owned() },
        error => TlsError::Pem { path, expected, got: error.to_string() },
    }
}
