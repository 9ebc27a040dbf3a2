//! Finds the roots that the programs of this system trust, and writes and updates the CA bundle, a file with these
//! roots and the local CA. It is for programs that trust only the roots in one file (`SSL_CERT_FILE`). If that file
//! contained only the local CA, these programs could connect only to Keychoir.

use std::fs;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::ca_directory::{CaError, write_if_changed};
use super::local_ca::LocalCa;

const BUNDLE_FILE: &str = "bundle.pem";

/// The start of the first line of a bundle. The line ends with the path of the roots that the bundle
/// contains.
const HEADER_PREFIX: &str = "# Keychoir's local authority, and all of ";

/// Paths at which operating systems store their trusted roots.
const SYSTEM_ROOTS: [&str; 6] = [
    // Debian, Ubuntu, Arch, Gentoo, NixOS
    "/etc/ssl/certs/ca-certificates.crt",
    // Fedora, Red Hat
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    // openSUSE
    "/etc/ssl/ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
    // Alpine, macOS
    "/etc/ssl/cert.pem",
];

/// The reason why a bundle cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file of roots cannot be read or contains no certificates. A program that used such a bundle could connect
    /// only to Keychoir.
    #[error("{} contains no readable certificates", .0.display())]
    NoRoots(PathBuf),
    /// The bundle cannot be written.
    #[error(transparent)]
    Unwritable(#[from] CaError),
}

/// Finds the file of roots that programs trust: `ssl_cert_file`, the value of `SSL_CERT_FILE`, or else the file of the
/// system. If `ssl_cert_file` is a bundle of Keychoir, returns the file of roots from which the bundle was made.
/// Ignores a bundle in `directory` that does not name its roots. Returns `None` if the system has no known file either.
#[must_use]
pub fn find_trusted_roots(ssl_cert_file: Option<&Path>, directory: &Path) -> Option<PathBuf> {
    let configured =
        ssl_cert_file.and_then(|path| match roots_of_bundle(&fs::read(path).unwrap_or_default()) {
            Some(roots) => Some(roots),
            None if path == directory.join(BUNDLE_FILE) => None,
            None => Some(path.to_owned()),
        });
    configured.or_else(|| SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()))
}

/// Writes the bundle of `roots` and the CA to `directory`. Returns the path of the bundle.
///
/// # Errors
///
/// Fails when `roots` contains no certificates, or the bundle cannot be written.
pub fn write_bundle(directory: &Path, ca: &LocalCa, roots: &Path) -> Result<PathBuf, BundleError> {
    let path = directory.join(BUNDLE_FILE);
    let root_certificates = fs::read(roots).unwrap_or_default();
    if !CertificateDer::pem_slice_iter(&root_certificates).any(|certificate| certificate.is_ok()) {
        return Err(BundleError::NoRoots(roots.to_owned()));
    }
    let header = format!("{HEADER_PREFIX}{}\n{}\n", roots.display(), ca.pem());
    write_if_changed(&path, &[header.as_bytes(), &root_certificates].concat())?;
    Ok(path)
}

/// Updates the bundle in `directory` if it exists. If the update fails, the error is logged.
pub fn refresh_bundle(directory: &Path, ca: &LocalCa) {
    let Ok(existing) = fs::read(directory.join(BUNDLE_FILE)) else { return };
    let Some(roots) = roots_of_bundle(&existing) else { return };
    if let Err(error) = write_bundle(directory, ca, &roots) {
        tracing::debug!("the CA bundle is not updated: {error}");
    }
}

/// Parses the path of the roots from which a bundle was made. Returns `None` if the file is not a bundle.
fn roots_of_bundle(bundle: &[u8]) -> Option<PathBuf> {
    let line = bundle.split(|&byte| byte == b'\n').next()?;
    let path = std::str::from_utf8(line).ok()?.strip_prefix(HEADER_PREFIX)?;
    (!path.is_empty()).then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::{CaLocation, ca_certificate_file, open};
    use crate::policy::units::UnixMs;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn generate_root(name: &str) -> String {
        rcgen::generate_simple_self_signed([name.to_owned()]).unwrap().cert.pem()
    }

    /// A file with one root, and the path of a CA directory.
    struct RootsFixture {
        _parent: tempfile::TempDir,
        directory: PathBuf,
        roots_file: PathBuf,
        root: String,
    }

    impl RootsFixture {
        fn new() -> Self {
            let parent = tempfile::tempdir().unwrap();
            let (directory, roots_file) = (parent.path().join("tls"), parent.path().join("roots.pem"));
            let root = generate_root("root.example");
            // A comment that is not UTF-8 must be copied as well.
            fs::write(&roots_file, [b"# R\xfcdiger's root\n", root.as_bytes()].concat()).unwrap();
            Self { _parent: parent, directory, roots_file, root }
        }
    }

    fn open_ca(directory: &Path) -> LocalCa {
        open(&CaLocation::Directory(directory.to_owned()), NOW).unwrap().ca
    }

    #[test]
    fn the_bundle_contains_the_trusted_roots_and_the_local_ca() {
        let RootsFixture { _parent, directory, roots_file, root } = RootsFixture::new();
        let ca = open_ca(&directory);
        let path = write_bundle(&directory, &ca, &roots_file).unwrap();
        let bundle = fs::read(&path).unwrap();
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bundle).collect::<Result<_, _>>().unwrap();
        let expected = [ca.pem(), &root];
        assert_eq!(certificates, expected.map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()));
    }

    #[test]
    fn a_bundle_never_contains_itself() {
        let RootsFixture { _parent, directory, roots_file, .. } = RootsFixture::new();
        assert_eq!(find_trusted_roots(Some(&roots_file), &directory), Some(roots_file.clone()));
        let path = write_bundle(&directory, &open_ca(&directory), &roots_file).unwrap();
        assert_eq!(find_trusted_roots(Some(&path), &directory), Some(roots_file.clone()));
        assert_eq!(
            find_trusted_roots(Some(&path), Path::new("/elsewhere")),
            Some(roots_file),
            "the roots of a bundle in another directory must be found"
        );
        let system_roots = find_trusted_roots(None, &directory);
        assert_ne!(system_roots.as_ref(), Some(&path));
        // A bundle without its first line does not name its roots.
        fs::write(&path, "").unwrap();
        assert_eq!(find_trusted_roots(Some(&path), &directory), system_roots);
    }

    #[test]
    fn opening_the_ca_refreshes_the_bundle() {
        let RootsFixture { _parent, directory, roots_file, .. } = RootsFixture::new();
        let path = write_bundle(&directory, &open_ca(&directory), &roots_file).unwrap();
        let new_root = generate_root("new.example");
        fs::write(&roots_file, &new_root).unwrap();
        open_ca(&directory);
        assert!(fs::read_to_string(&path).unwrap().ends_with(&new_root));
        fs::remove_file(directory.join("authority.pem")).unwrap();
        open_ca(&directory);
        let ca = fs::read_to_string(ca_certificate_file(&directory)).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains(&ca));
        // The bundle keeps its content while the file of roots is missing.
        fs::remove_file(&roots_file).unwrap();
        open_ca(&directory);
        assert!(fs::read_to_string(&path).unwrap().ends_with(&new_root));
    }

    #[test]
    fn a_bundle_is_not_written_without_roots() {
        let RootsFixture { _parent, directory, roots_file, .. } = RootsFixture::new();
        fs::write(&roots_file, "no certificates").unwrap();
        let error = write_bundle(&directory, &open_ca(&directory), &roots_file).unwrap_err();
        assert!(matches!(error, BundleError::NoRoots(_)), "the error must be about the roots: {error}");
        assert!(!directory.join(BUNDLE_FILE).exists());
    }
}
