//! Creates the CA and the certificates of the comparison, and the TLS settings of servers and clients. All connections
//! use the same cipher suite, so that the preferences of TLS libraries do not affect the results.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// The paths of the files with the certificates and the key.
#[derive(Clone, Debug)]
pub struct Certificates {
    pub ca_certificate: PathBuf,
    /// The certificate of `localhost`, for the proxies and the provider.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The certificate and its key in one file, as HAProxy requires.
    pub pair: PathBuf,
}

impl Certificates {
    /// Creates the files in `directory`.
    pub fn create(directory: &Path) -> Self {
        let mut params = CertificateParams::default();
        // If the certificates of the CA and of the server had the same name, the latter would seem self-signed.
        params.distinguished_name.push(DnType::CommonName, "Keychoir benchmark CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        let ca_certificate = params.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(params, ca_key);
        let key = KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
        let write_file = |name: &str, pem: String| {
            let path = directory.join(name);
            fs::write(&path, pem).unwrap();
            path
        };
        Self {
            ca_certificate: write_file("ca.pem", ca_certificate.pem()),
            certificate: write_file("certificate.pem", certificate.pem()),
            key: write_file("key.pem", key.serialize_pem()),
            pair: write_file("pair.pem", certificate.pem() + &key.serialize_pem()),
        }
    }

    /// Returns the TLS settings of the provider.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        let chain = CertificateDer::pem_file_iter(&self.certificate).unwrap();
        let chain = chain.map(|certificate| certificate.unwrap()).collect();
        let key = PrivateKeyDer::from_pem_file(&self.key).unwrap();
        let config = ServerConfig::builder_with_provider(single_suite_provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Arc::new(config)
    }

    /// Returns the TLS settings of a client that trusts the CA.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        for ca_certificate in CertificateDer::pem_file_iter(&self.ca_certificate).unwrap() {
            roots.add(ca_certificate.unwrap()).unwrap();
        }
        let config = ClientConfig::builder_with_provider(single_suite_provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    }
}

/// Returns a cryptography provider with a single cipher suite.
fn single_suite_provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    // OpenSSL and rustls both prefer this suite, and ElevenLabs supports it.
    provider.cipher_suites = vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384];
    Arc::new(provider)
}
