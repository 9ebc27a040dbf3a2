//! An authority for this measurement, and who shows and trusts its certificates. All ends agree on one
//! cipher suite, so that no library is ahead by its own preference.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Where the certificates are.
#[derive(Clone, Debug)]
pub struct Certificates {
    /// The authority.
    pub authority: PathBuf,
    /// What a server on this machine shows.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Both in one, as HAProxy wants them.
    pub pair: PathBuf,
}

impl Certificates {
    /// Makes them in this folder.
    pub fn make(folder: &Path) -> Self {
        let mut params = CertificateParams::default();
        // Of the same name, they would be taken for one that signed itself.
        params.distinguished_name.push(DnType::CommonName, "authority of a comparison");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().unwrap();
        let authority = params.self_signed(&authority_key).unwrap();
        let issuer = Issuer::new(params, authority_key);
        let key = KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).unwrap();
            path
        };
        Self {
            authority: write("authority.pem", authority.pem()),
            certificate: write("certificate.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
            pair: write("pair.pem", certificate.pem() + &key.serialize_pem()),
        }
    }

    /// For who shows the certificate.
    pub fn server(&self) -> Arc<ServerConfig> {
        let chain = CertificateDer::pem_file_iter(&self.certificate).unwrap();
        let chain = chain.map(|certificate| certificate.unwrap()).collect();
        let key = PrivateKeyDer::from_pem_file(&self.key).unwrap();
        let config = ServerConfig::builder_with_provider(one_suite())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Arc::new(config)
    }

    /// For who trusts the authority.
    pub fn client(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_file_iter(&self.authority).unwrap() {
            roots.add(authority.unwrap()).unwrap();
        }
        let config = ClientConfig::builder_with_provider(one_suite())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    }
}

fn one_suite() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    // The first that OpenSSL and rustls offer; the provider's front end takes it, too.
    provider.cipher_suites = vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384];
    Arc::new(provider)
}
