//! Writes the CA bundle: the system's roots and the local CA in one file. Some programs trust only
//! the roots of one file: with the local CA alone they could connect to Keychoir and to no other
//! host.

use std::fs;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::folder::{AuthorityError, write_changed};
use super::local_ca::LocalCa;

const BUNDLE: &str = "bundle.pem";

/// The beginning of the bundle's first line, which ends with the path of the file with the roots.
const HEADER_PREFIX: &str = "# Keychoir's local authority, and all of ";

/// Files in which systems keep their trusted roots.
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
    /// The file of roots is unreadable; a bundle without them would break all other connections.
    #[error("{} has no certificates that can be read", .0.display())]
    NoRoots(PathBuf),
    /// The bundle cannot be written.
    #[error(transparent)]
    Unwritable(#[from] AuthorityError),
}

/// The file of roots that programs trust now: the one that `variable` (`SSL_CERT_FILE`) names, or
/// the system's. For a bundle of Keychoir, the file it was made from.
#[must_use]
pub fn roots(variable: Option<&Path>, folder: &Path) -> Option<PathBuf> {
    let named = variable.and_then(|path| match roots_of(&fs::read(path).unwrap_or_default()) {
        Some(roots) => Some(roots),
        None if path == folder.join(BUNDLE) => None,
        None => Some(path.to_owned()),
    });
    named.or_else(|| SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()))
}

/// Writes the bundle of `roots` and the CA into the folder.
///
/// # Errors
///
/// When `roots` contains no certificates, or the bundle cannot be written.
pub fn bundle(folder: &Path, authority: &LocalCa, roots: &Path) -> Result<PathBuf, BundleError> {
    let path = folder.join(BUNDLE);
    let trusted = fs::read(roots).unwrap_or_default();
    if !CertificateDer::pem_slice_iter(&trusted).any(|certificate| certificate.is_ok()) {
        return Err(BundleError::NoRoots(roots.to_owned()));
    }
    let head = format!("{HEADER_PREFIX}{}\n{}\n", roots.display(), authority.pem());
    write_changed(&path, &[head.as_bytes(), &trusted].concat())?;
    Ok(path)
}

/// Updates an existing bundle; does nothing without one.
pub fn refresh_bundle(folder: &Path, authority: &LocalCa) {
    let Ok(written) = fs::read(folder.join(BUNDLE)) else { return };
    let Some(roots) = roots_of(&written) else { return };
    if let Err(error) = bundle(folder, authority, &roots) {
        tracing::debug!("the CA bundle is not updated: {error}");
    }
}

/// The path of the roots that a bundle was made from.
fn roots_of(bundle: &[u8]) -> Option<PathBuf> {
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

    fn authority(folder: &Path) -> LocalCa {
        open(&CaLocation::Folder(folder.to_owned()), NOW).unwrap().authority
    }

    #[test]
    fn the_bundle_has_the_trusted_roots_and_the_local_authority() {
        let (_state, folder, file, root) = setup();
        let authority = authority(&folder);
        let path = bundle(&folder, &authority, &file).unwrap();
        let written = fs::read(&path).unwrap();
        let certificates: Vec<_> =
            CertificateDer::pem_slice_iter(&written).collect::<Result<_, _>>().unwrap();
        let expected = [authority.pem(), &root];
        assert_eq!(certificates, expected.map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()));
    }

    #[test]
    fn a_bundle_never_contains_itself() {
        let (_state, folder, file, _) = setup();
        assert_eq!(roots(Some(&file), &folder), Some(file.clone()));
        let path = bundle(&folder, &authority(&folder), &file).unwrap();
        assert_eq!(roots(Some(&path), &folder), Some(file.clone()));
        assert_eq!(
            roots(Some(&path), Path::new("/elsewhere")),
            Some(file),
            "nor of another bundle of Keychoir"
        );
        let system = roots(None, &folder);
        assert_ne!(system.as_ref(), Some(&path));
        // A bundle without its first line does not name its roots.
        fs::write(&path, "").unwrap();
        assert_eq!(roots(Some(&path), &folder), system);
    }

    #[test]
    fn the_bundle_follows_the_roots_and_the_authority() {
        let (_state, folder, file, _) = setup();
        let path = bundle(&folder, &authority(&folder), &file).unwrap();
        let other = rcgen::generate_simple_self_signed(["other.example".to_owned()]).unwrap().cert.pem();
        fs::write(&file, &other).unwrap();
        authority(&folder);
        assert!(fs::read_to_string(&path).unwrap().ends_with(&other));
        fs::remove_file(folder.join("authority.pem")).unwrap();
        authority(&folder);
        let ca = fs::read_to_string(ca_file(&folder)).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains(&ca));
        // A bundle keeps its content while the file of roots is missing.
        fs::remove_file(&file).unwrap();
        authority(&folder);
        assert!(fs::read_to_string(&path).unwrap().ends_with(&other));
    }

    #[test]
    fn no_bundle_is_written_without_roots() {
        let (_state, folder, file, _) = setup();
        fs::write(&file, "no certificates").unwrap();
        let error = bundle(&folder, &authority(&folder), &file).unwrap_err();
        assert!(matches!(error, BundleError::NoRoots(_)), "{error}");
        assert!(!folder.join(BUNDLE).exists());
    }
}
