//! Writes the CA bundle, a file with the system's trusted roots and the local CA. Programs that trust only
//! the roots in one file (`SSL_CERT_FILE`) need it: with the local CA alone, they could connect only to
//! Keychoir.

use std::fs;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::ca_folder::{CaError, write_if_changed};
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

/// The reason why no bundle was written.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file of roots contains no certificate. Programs could not connect to other hosts with a bundle
    /// without roots.
    #[error("{} contains no readable certificates", .0.display())]
    NoRoots(PathBuf),
    /// The bundle cannot be written.
    #[error(transparent)]
    Unwritable(#[from] CaError),
}

/// Finds the file of roots that programs trust now: `ssl_cert_file`, which is the value of `SSL_CERT_FILE`,
/// or that of the system. If `ssl_cert_file` is a bundle of Keychoir, returns the file of roots that the
/// bundle was made from.
#[must_use]
pub fn find_trusted_roots(ssl_cert_file: Option<&Path>, folder: &Path) -> Option<PathBuf> {
    let configured =
        ssl_cert_file.and_then(|path| match roots_of_bundle(&fs::read(path).unwrap_or_default()) {
            Some(roots) => Some(roots),
            None if path == folder.join(BUNDLE_FILE) => None,
            None => Some(path.to_owned()),
        });
    configured.or_else(|| SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()))
}

/// Writes the bundle of `roots` and the CA to `folder`; returns its path.
///
/// # Errors
///
/// Fails when `roots` contains no certificates, or the bundle cannot be written.
pub fn write_bundle(folder: &Path, ca: &LocalCa, roots: &Path) -> Result<PathBuf, BundleError> {
    let path = folder.join(BUNDLE_FILE);
    let root_certificates = fs::read(roots).unwrap_or_default();
    if !CertificateDer::pem_slice_iter(&root_certificates).any(|certificate| certificate.is_ok()) {
        return Err(BundleError::NoRoots(roots.to_owned()));
    }
    let header = format!("{HEADER_PREFIX}{}\n{}\n", roots.display(), ca.pem());
    write_if_changed(&path, &[header.as_bytes(), &root_certificates].concat())?;
    Ok(path)
}

/// Updates the bundle in `folder`, if there is one.
pub fn refresh_bundle(folder: &Path, ca: &LocalCa) {
    let Ok(existing) = fs::read(folder.join(BUNDLE_FILE)) else { return };
    let Some(roots) = roots_of_bundle(&existing) else { return };
    if let Err(error) = write_bundle(folder, ca, &roots) {
        tracing::debug!("the CA bundle is not updated: {error}");
    }
}

/// Parses the path of the roots that a bundle was made from, or `None` for any other file.
fn roots_of_bundle(bundle: &[u8]) -> Option<PathBuf> {
    let line = bundle.split(|&byte| byte == b'\n').next()?;
    let path = std::str::from_utf8(line).ok()?.strip_prefix(HEADER_PREFIX)?;
    (!path.is_empty()).then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::{CaLocation, ca_file, open};
    use crate::policy::units::UnixMs;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    /// A folder with a CA, and a file of roots beside it.
    fn setup() -> (tempfile::TempDir, PathBuf, PathBuf, String) {
        let state = tempfile::tempdir().unwrap();
        let (folder, roots) = (state.path().join("tls"), state.path().join("roots.pem"));
        let root = rcgen::generate_simple_self_signed(["root.example".to_owned()]).unwrap().cert.pem();
        fs::write(&roots, [b"# R\xfcdiger's root\n", root.as_bytes()].concat()).unwrap();
        (state, folder, roots, root)
    }

    fn open_ca(folder: &Path) -> LocalCa {
        open(&CaLocation::Folder(folder.to_owned()), NOW).unwrap().ca
    }

    #[test]
    fn the_bundle_contains_the_trusted_roots_and_the_local_ca() {
        let (_state, folder, roots_file, root) = setup();
        let ca = open_ca(&folder);
        let path = write_bundle(&folder, &ca, &roots_file).unwrap();
        let written = fs::read(&path).unwrap();
        let certificates: Vec<_> =
            CertificateDer::pem_slice_iter(&written).collect::<Result<_, _>>().unwrap();
        let expected = [ca.pem(), &root];
        assert_eq!(certificates, expected.map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()));
    }

    #[test]
    fn a_bundle_never_contains_itself() {
        let (_state, folder, roots_file, _) = setup();
        assert_eq!(find_trusted_roots(Some(&roots_file), &folder), Some(roots_file.clone()));
        let path = write_bundle(&folder, &open_ca(&folder), &roots_file).unwrap();
        assert_eq!(find_trusted_roots(Some(&path), &folder), Some(roots_file.clone()));
        assert_eq!(
            find_trusted_roots(Some(&path), Path::new("/elsewhere")),
            Some(roots_file),
            "the roots of a bundle in another folder were not found"
        );
        let system = find_trusted_roots(None, &folder);
        assert_ne!(system.as_ref(), Some(&path));
        // A bundle without its first line does not name its roots.
        fs::write(&path, "").unwrap();
        assert_eq!(find_trusted_roots(Some(&path), &folder), system);
    }

    #[test]
    fn opening_the_ca_refreshes_the_bundle() {
        let (_state, folder, roots_file, _) = setup();
        let path = write_bundle(&folder, &open_ca(&folder), &roots_file).unwrap();
        let other = rcgen::generate_simple_self_signed(["other.example".to_owned()]).unwrap().cert.pem();
        fs::write(&roots_file, &other).unwrap();
        open_ca(&folder);
        assert!(fs::read_to_string(&path).unwrap().ends_with(&other));
        fs::remove_file(folder.join("authority.pem")).unwrap();
        open_ca(&folder);
        let ca = fs::read_to_string(ca_file(&folder)).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains(&ca));
        // The bundle keeps its content while the file of roots is missing.
        fs::remove_file(&roots_file).unwrap();
        open_ca(&folder);
        assert!(fs::read_to_string(&path).unwrap().ends_with(&other));
    }

    #[test]
    fn a_bundle_is_not_written_without_roots() {
        let (_state, folder, roots_file, _) = setup();
        fs::write(&roots_file, "no certificates").unwrap();
        let error = write_bundle(&folder, &open_ca(&folder), &roots_file).unwrap_err();
        assert!(matches!(error, BundleError::NoRoots(_)), "{error}");
        assert!(!folder.join(BUNDLE_FILE).exists());
    }
}
