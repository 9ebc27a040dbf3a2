//! Checks the merged configuration: missing keys, an address that is open to other machines, conflicting addresses, a
//! missing database path, buffer sizes, requests that Keychoir would send to itself, and keys that are sent in clear
//! text. Also reads the certificate that `server.tls` names.

use super::ConfigDraft;
use crate::config::keys::KeyListSource;
use crate::config::problem::{SourceSpan, ValueError, ValueOrigin};
use crate::config::proxy::ProxySetting;
use crate::config::source::ValueSources;
use crate::config::tls::TlsMode;
use crate::config::{Config, HostPort, KeyRequirement, ListenAddress};
use crate::policy::authority::Scheme;
use crate::policy::quantity::size::DisplaySize;

impl ConfigDraft {
    /// Rejects a configuration without keys if keys are required.
    pub(super) fn check_keys(&mut self, requirement: KeyRequirement, sources: &ValueSources<'_>) {
        let has_keys = self.config.key_source != KeyListSource::Absent
            || sources.environment.non_utf8_names.iter().any(|name| name.starts_with("ELEVENLABS_API_KEYS"));
        if has_keys || requirement == KeyRequirement::Optional {
            return;
        }
        // The provider's own libraries read this variable.
        let suggestion = sources.environment.value("ELEVENLABS_API_KEY").map(|_| "ELEVENLABS_API_KEYS");
        let error = ValueError::new("no ElevenLabs API keys are configured")
            .suggest(suggestion)
            .advise("set ELEVENLABS_API_KEYS=sk_first,sk_second")
            .advise("or put them in a file, one per line, and set ELEVENLABS_API_KEYS_FILE to its path")
            .advise(
                "or write a [[keys]] entry with `key` or `key_file` for each key in the configuration file",
            )
            .advise("to try Keychoir without a key, run: keychoir demo");
        self.report.problems.push(SourceSpan::new(ValueOrigin::Absent).problem(error));
    }

    /// Rejects an address for clients that other machines can reach if no client token is required.
    pub(super) fn check_exposure(&mut self, has_clients: bool) {
        let Some(listen) = self.config.server.listen.exposed_address().filter(|_| !has_clients) else {
            return;
        };
        let error =
            ValueError::new(format!("{listen} is open to other machines, and no client token is required"))
                .advise("add a client with `keychoir clients add NAME`, or write a [[clients]] entry with `name` and `token_sha256`")
                .advise("or put a token into a file and set KEYCHOIR_CLIENT_TOKEN_FILE to its path, for example to a secret of a container")
                .advise(format!(
                    "or listen on 127.0.0.1:{}, also in a container that shares the network of the app",
                    listen.port()
                ))
                .advise("or listen on a Unix socket in a directory that the app shares: unix:/run/keychoir/keychoir.sock");
        self.report.problems.push(self.find_span(&["server.listen"]).problem(error));
    }

    /// Rejects an address for operators that is also an address for clients, or that other machines can reach if there
    /// is no admin token. Without a configured token, the first startup generates one in the state directory.
    pub(super) fn check_admin_listen(&mut self) {
        let Config { server, admin, admin_token, .. } = &self.config;
        let Some(address) = admin.listen.address() else { return };
        let is_conflict = |other: &&ListenAddress| {
            *other == address || address.conflicts_with(other) || other.conflicts_with(address)
        };
        let conflict = server.listen.iter().find(is_conflict);
        let exposed = admin.listen.exposed_address();
        let error = if let Some(other) = conflict {
            ValueError::new(format!("{address} and {other} of server.listen are the same address"))
                .advise("give one of them another port or path")
        } else if let Some(exposed) = exposed
            && admin_token.is_none()
            && self.config.state_directory().is_none()
        {
            ValueError::new(format!("{exposed} is open to other machines, and there is no admin token"))
                .advise("set admin.token_file or KEYCHOIR_ADMIN_TOKEN")
                .advise(format!("or listen on 127.0.0.1:{}", exposed.port()))
        } else {
            return;
        };
        self.report.problems.push(self.find_span(&["admin.listen"]).problem(error));
    }

    /// Rejects a configuration that sets no path of the database. It is called only if there is no default path.
    pub(super) fn check_storage(&mut self) {
        if self.config.storage.ephemeral || self.spans.contains_key("storage.path") {
            return;
        }
        let error = ValueError::new("the usage database has no default directory, because HOME is not set")
            .advise("set KEYCHOIR_STORAGE__PATH to a file")
            .advise(
                "or KEYCHOIR_STORAGE__EPHEMERAL=true (or `serve --ephemeral`) to keep usage records in memory only",
            );
        self.report.problems.push(SourceSpan::new(ValueOrigin::Absent).problem(error));
    }

    /// Reads the certificate in the files of `server.tls`. Rejects a certificate without a private key, and a private
    /// key without a certificate, but only with `is_fully_parsed`, because the missing setting may be in a part of the
    /// file that was not parsed.
    pub(super) fn read_certificate(&mut self, sources: &ValueSources<'_>, is_fully_parsed: bool) {
        const KEYWORD: &str = "server.tls";
        const FILES: [&str; 2] = ["server.tls.cert", "server.tls.key"];
        let is_variable = |span: &&SourceSpan| matches!(span.origin, ValueOrigin::Variable(_));
        let variable_span = |path: &str| self.spans.get(path).filter(is_variable);
        if let (Some(keyword_span), Some(_)) =
            (variable_span(KEYWORD), FILES.iter().find_map(|path| variable_span(path)))
        {
            let error = ValueError::new("environment variables set both server.tls and its files");
            self.report.problems.push(keyword_span.problem(
                error.advise("remove this one to use the files, or KEYCHOIR_SERVER__TLS__CERT and __KEY"),
            ));
            return;
        }
        let tls = self.config.server.tls.clone();
        if tls.mode() != TlsMode::Files {
            return;
        }
        for (is_missing, [present, missing], message) in [
            (tls.key.is_none(), FILES, "the certificate has no private key"),
            (tls.cert.is_none(), [FILES[1], FILES[0]], "the private key has no certificate"),
        ] {
            // A setting with an invalid value is also missing, and its own problem is reported.
            let origin = self.spans.get(missing).map(|span| &span.origin);
            let is_reported = self.report.problems.iter().any(|problem| Some(problem.origin()) == origin);
            if is_missing && is_fully_parsed && !is_reported {
                let name = missing.rsplit('.').next().unwrap_or_default();
                let span = self.find_span(&[present]);
                let advice = match span.origin {
                    ValueOrigin::Variable(_) => {
                        format!("set KEYCHOIR_SERVER__TLS__{}=FILE", name.to_uppercase())
                    }
                    ValueOrigin::Flag(_)
                    | ValueOrigin::Line { .. }
                    | ValueOrigin::File(_)
                    | ValueOrigin::Absent => {
                        format!("add {name} = \"FILE\"")
                    }
                };
                self.report.problems.push(span.problem(ValueError::new(message).advise(advice)));
            }
        }
        let (cert_span, key_span) = (self.find_span(&FILES[..1]), self.find_span(&FILES[1..]));
        self.config.certificate = tls.read_certificate(sources, [&cert_span, &key_span], &mut self.report);
    }

    /// Rejects a buffer for one request that is larger than the buffers of all requests together.
    pub(super) fn check_retry(&mut self) {
        let retry = &self.config.retry;
        let (max_per_request, max_total) = (retry.buffer_size, retry.max_total_buffer_size);
        if max_per_request > max_total {
            let (max_per_request, max_total) =
                (DisplaySize(max_per_request as u64), DisplaySize(max_total as u64));
            let message = format!(
                "one request may buffer {max_per_request} (`retry.buffer_size`), but all requests together only {max_total}"
            );
            let span = self.find_span(&["retry.max_total_buffer_size", "retry.buffer_size"]);
            self.report
                .problems
                .push(span.problem(ValueError::new(message).advise("raise `retry.max_total_buffer_size`")));
        }
    }

    /// Rejects base URLs and forward proxies whose host and port are those of a listener of Keychoir. Host names are
    /// not looked up.
    pub(super) fn check_loop(&mut self) {
        let key_urls = self.config.keys.iter().filter_map(|key| key.base_url.as_ref());
        let mut urls = std::iter::once(&self.config.upstream.base_url).chain(key_urls);
        let admin_address = match self.config.admin.listen.address() {
            Some(ListenAddress::Tcp(address)) => Some(address),
            Some(ListenAddress::Unix(_) | ListenAddress::Systemd) | None => None,
        };
        let own_addresses: Vec<&HostPort> =
            self.config.server.listen.tcp_addresses().chain(admin_address).collect();
        let find_own_address = |host: &str, port| {
            own_addresses.iter().copied().find(|address| address.is_reached_by(host, port))
        };
        let own_address = urls.find_map(|url| find_own_address(url.host(), url.port()));
        let routes = self.config.proxy_routes();
        let default_url = &self.config.upstream.base_url;
        let key_proxies =
            self.config.keys.iter().filter_map(|key| {
                routes.for_upstream(key.base_url.as_ref().unwrap_or(default_url), &key.proxy)
            });
        let mut proxies =
            routes.for_upstream(default_url, &ProxySetting::Inherited).into_iter().chain(key_proxies);
        if let Some(address) = proxies.find_map(|proxy| find_own_address(proxy.host(), proxy.port())) {
            let message =
                format!("{address} is an address on which Keychoir itself listens, and not a forward proxy");
            let error = ValueError::new(message)
                .advise("set the proxy to one that leads to ElevenLabs, or to \"direct\"");
            let span = self.find_span(&["upstream.proxy", "upstream.proxy_file", "server.listen"]);
            self.report.problems.push(span.problem(error));
        }
        let Some(address) = own_address else { return };
        let message = format!(
            "{address} is an address on which Keychoir itself listens, so it would send requests to itself"
        );
        let error = ValueError::new(message)
            .advise("set the base URL to that of ElevenLabs, of a gateway in front of it, or of a simulator")
            .advise("or listen on another address (`server.listen`)");
        self.report.problems.push(self.find_span(&["upstream.base_url", "server.listen"]).problem(error));
    }

    /// Warns about a base URL that sends keys to another machine without TLS.
    pub(super) fn check_upstream(&mut self) {
        let url = &self.config.upstream.base_url;
        if url.scheme() == Scheme::Http && !url.is_loopback() {
            let message =
                "the keys are sent over the network in clear text: use https:// if the host supports it";
            self.report.warnings.push(self.find_span(&["upstream.base_url"]).warning(message));
        }
    }
}
