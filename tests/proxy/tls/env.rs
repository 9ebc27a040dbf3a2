//! Tests `keychoir env`, which creates the local CA and prints the environment variables with which SDKs use the proxy
//! and trust its CA. If a variable cannot be set, the output explains the reason. A CA that cannot be created or read
//! is reported.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{ProgramDirectory, assert_https, start_program};
use crate::support::program::{keychoir_command, run, stderr};

/// Returns the command `keychoir env` with the given `home` directory.
fn env_command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = keychoir_command(&[&["env"], arguments].concat());
    command.env("HOME", home);
    command
}

/// Runs a command that must succeed without a message. Returns its standard output.
#[track_caller]
fn run_successfully(command: &mut Command) -> String {
    let output = run(command);
    assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
    assert_eq!(stderr(&output), "");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn env_prints_the_variables_before_the_first_start() {
    let directory = ProgramDirectory::new();
    let home = directory.path("it's home");
    let root = rcgen::generate_simple_self_signed(["root.example".to_owned()]).unwrap().cert.pem();
    directory.write("roots.pem", &root);
    let roots = directory.path("roots.pem");
    let output = run_successfully(env_command(&home, &[]).env("SSL_CERT_FILE", &roots));
    let state = home.join(".local/state/keychoir/tls").display().to_string();
    let quoted_path = state.replace('\'', r"'\''");
    let expected = format!(
        "# For a shell: eval \"$(keychoir env)\"

# The address of Keychoir, for an SDK's base_url (Python) or baseUrl (JavaScript); https:// works as well.
export ELEVENLABS_BASE_URL=http://127.0.0.1:11011

# HTTPS with Python and OpenSSL: Keychoir's CA and all CAs of {}, because this variable replaces the trusted CAs.
export SSL_CERT_FILE='{quoted_path}/bundle.pem'

# HTTPS with Node: Keychoir's CA, in addition to the CAs that Node trusts.
export NODE_EXTRA_CA_CERTS='{quoted_path}/ca.pem'
",
        roots.display()
    );
    assert_eq!(output, expected);
    let bundle = fs::read_to_string(format!("{state}/bundle.pem")).unwrap();
    let ca = fs::read_to_string(format!("{state}/ca.pem")).unwrap();
    assert!(bundle.contains(&ca) && bundle.ends_with(&root) && !bundle.contains("PRIVATE"));

    // In a shell that has evaluated the output, the command prints the same output again.
    let script =
        "eval \"$(\"$0\" env)\" && \"$0\" env && test -r \"$SSL_CERT_FILE\" -a -r \"$NODE_EXTRA_CA_CERTS\"";
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_keychoir")]).env_clear().env("HOME", &home);
    assert_eq!(run_successfully(shell.env("SSL_CERT_FILE", &roots)), expected);
}

#[test]
fn env_explains_missing_settings() {
    let directory = ProgramDirectory::new();
    let home = directory.path("home");
    directory.write_certificate("keys.example");
    let print_env = |variables: &[(&str, &str)]| {
        let mut command = env_command(&home, &[]);
        command.envs(variables.iter().copied());
        run_successfully(&mut command)
    };
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| directory.path(name).to_str().unwrap().to_owned());
    for (variables, comment, has_base_url) in [
        (&[("KEYCHOIR_SERVER__TLS", "off")] as &[_], "# HTTPS is disabled (server.tls).", true),
        (
            &[("KEYCHOIR_STORAGE__EPHEMERAL", "true")],
            "# HTTPS cannot be trusted: its CA is kept only in memory",
            true,
        ),
        (
            &[("KEYCHOIR_SERVER__TLS__CERT", &*cert), ("KEYCHOIR_SERVER__TLS__KEY", &*key)],
            "# HTTPS uses the certificate of server.tls",
            true,
        ),
        (&[("KEYCHOIR_SERVER__LISTEN", "unix:/run/k.sock")], "# HTTPS is not available", false),
    ] {
        let output = print_env(variables);
        assert!(output.contains(comment), "the output must contain {comment:?}: {output}");
        assert_eq!(
            output.contains("export ELEVENLABS_BASE_URL=http://127.0.0.1:11011\n"),
            has_base_url,
            "the output must name the base URL only if there is a port: {output}"
        );
        assert!(
            !output.contains("export SSL_CERT_FILE") && !output.contains("export NODE"),
            "no variable must be set without a trusted CA: {output}"
        );
    }
    assert!(!home.exists(), "an unneeded directory must not be created");
    let output =
        print_env(&[("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0"), ("NODE_EXTRA_CA_CERTS", "/corp.pem")]);
    assert!(
        output.contains("names no fixed port") && !output.contains("BASE_URL"),
        "the output must explain the missing port: {output}"
    );
    assert!(
        output.contains(
            "# The variable named /corp.pem before: to trust both files, join them in one file.\nexport NODE"
        ),
        "the output must explain the replaced variable: {output}"
    );
    // The bundle contains the other roots, so both variables may name it.
    let root = rcgen::generate_simple_self_signed(["root.example".to_owned()]).unwrap().cert.pem();
    directory.write("roots.pem", root);
    let roots = directory.path("roots.pem").to_str().unwrap().to_owned();
    let output = print_env(&[("SSL_CERT_FILE", &roots), ("NODE_EXTRA_CA_CERTS", &roots)]);
    assert!(
        output.contains("/tls/bundle.pem\n\n# HTTPS with Node: the same file,"),
        "both variables must name the bundle: {output}"
    );
    assert_eq!(output.matches("/tls/bundle.pem\n").count(), 2, "the bundle must be named twice: {output}");
    // Without readable roots, the variable that replaces the default roots is not set.
    fs::write(directory.path("roots.pem"), "no certificates").unwrap();
    let output = print_env(&[("SSL_CERT_FILE", directory.path("roots.pem").to_str().unwrap())]);
    assert!(
        output.contains("roots.pem contains no certificates") && !output.contains("export SSL_CERT_FILE"),
        "the output must explain the missing roots: {output}"
    );
}

#[test]
fn env_fails_without_a_local_ca() {
    let directory = ProgramDirectory::new();
    fs::write(directory.path("file"), "").unwrap();
    let mut command = env_command(&directory.path("home"), &[]);
    let output = run(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", directory.path("file/tls")));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("file/tls"),
        "the error message must contain `file/tls`: {}",
        stderr(&output)
    );
    assert!(String::from_utf8(output.stdout).unwrap().contains("export ELEVENLABS_BASE_URL="));
}

#[test]
fn env_reports_a_malformed_local_ca() {
    let program_directory = ProgramDirectory::new();
    program_directory.write("authority.pem", "not a CA");
    let mut command = env_command(&program_directory.path("home"), &[]);
    let output = run(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", program_directory.directory.path()));
    assert_eq!(output.status.code(), Some(0));
    assert!(
        stderr(&output).contains("is malformed. Its file is kept as"),
        "the error message must contain `is malformed. Its file is kept as`: {}",
        stderr(&output)
    );
}

#[tokio::test]
async fn the_local_ca_created_by_env_is_served() {
    let directory = ProgramDirectory::new();
    let tls_directory = directory.path("tls");
    run_successfully(
        env_command(&directory.path("home"), &[]).env("KEYCHOIR_SERVER__TLS_DIRECTORY", &tls_directory),
    );
    let ca = fs::read(tls_directory.join("ca.pem")).unwrap();
    let mut command = directory.command("keychoir.db");
    let (program, address) = start_program(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", &tls_directory));
    assert_https(address, &tls_directory.join("ca.pem"), "localhost").await;
    assert_eq!(fs::read(tls_directory.join("ca.pem")).unwrap(), ca);
    assert_eq!(program.terminate().0, Some(0));
}
