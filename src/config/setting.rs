//! The table of settings: the path, the kind with its limits, and the field it ends in. Reading
//! files and variables, suggestions and the test over the reference file all follow from it, so
//! that a new setting is one entry here and one field with its default in `sections`.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::Config;
use super::listen::Listens;
use super::problem::WrongValue;
use super::tls::{self, TlsConfig};
use super::value::{
    BYTES, DAY, Folders, GIBI, HOUR, MEBI, MILLISECONDS, MINUTE, PIECES, Raw, Unit, ratio, saturated, switch,
    text, texts, whole_number, wrong_type,
};
use super::visitors;

/// One entry of the table.
pub(super) struct Setting {
    /// `section.name`, as the TOML file and the documents write it. A setting that may be a table is a
    /// section too.
    pub(super) path: &'static str,
    kind: Kind,
}

/// What a value may be, and the field it ends in.
enum Kind {
    Word(fn(&mut Config) -> &mut dyn Word),
    Places(fn(&mut Config) -> &mut Listens),
    /// A word; a table instead of it has settings of its own.
    Tls(fn(&mut Config) -> &mut TlsConfig),
    /// A list of names, each of which `fn` reads.
    Names(fn(&str) -> Result<String, WrongValue>, fn(&mut Config) -> &mut Vec<String>),
    Millis(RangeInclusive<u64>, fn(&mut Config) -> &mut Duration),
    Bytes(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Count(RangeInclusive<u64>, fn(&mut Config) -> &mut usize),
    Ratio(fn(&mut Config) -> &mut f64),
    Switch(fn(&mut Config) -> &mut bool),
    File(fn(&mut Config) -> &mut PathBuf),
    /// An empty text is no file.
    OptionalFile(fn(&mut Config) -> &mut Option<PathBuf>),
}

pub(super) static TABLE: &[Setting] = &[
    entry("server.listen", Kind::Places(|c| &mut c.server.listen)),
    entry("server.unix_mode", Kind::Word(|c| &mut c.server.unix_mode)),
    entry("server.tls", Kind::Tls(|c| &mut c.server.tls)),
    entry("server.tls.cert", Kind::OptionalFile(|c| &mut c.server.tls.cert)),
    entry("server.tls.key", Kind::OptionalFile(|c| &mut c.server.tls.key)),
    entry("server.tls_directory", Kind::OptionalFile(|c| &mut c.server.tls_directory)),
    entry("server.head_read_ms_max", Kind::Millis(1..=HOUR, |c| &mut c.server.head_read_max)),
    entry("server.keepalive_timeout", Kind::Millis(1..=DAY, |c| &mut c.server.keepalive_timeout)),
    entry("server.linger_timeout", Kind::Millis(0..=HOUR, |c| &mut c.server.linger_timeout)),
    entry("server.max_linger_size", Kind::Bytes(0..=1024 * GIBI, |c| &mut c.server.linger_bytes_max)),
    // hyper refuses a smaller buffer than 8192 bytes.
    entry("server.head_bytes_max", Kind::Bytes(8192..=MEBI, |c| &mut c.server.head_bytes_max)),
    entry("server.connections_max", Kind::Count(1..=1_000_000, |c| &mut c.server.connections_max)),
    entry("server.requests_max", Kind::Count(1..=1_000_000, |c| &mut c.server.requests_max)),
    entry("server.max_requests_per_client", Kind::Count(0..=MEBI, |c| &mut c.server.max_requests_per_client)),
    entry("server.workers", Kind::Count(0..=1024, |c| &mut c.server.workers)),
    entry("server.base_path", Kind::Word(|c| &mut c.server.base_path)),
    entry("server.shutdown_grace_ms", Kind::Millis(0..=HOUR, |c| &mut c.server.shutdown_grace)),
    entry("server.drain_idle_timeout", Kind::Millis(0..=HOUR, |c| &mut c.server.drain_idle_timeout)),
    entry("server.reload_interval_ms", Kind::Millis(0..=HOUR, |c| &mut c.server.reload_interval)),
    entry("server.write_idle_ms_max", Kind::Millis(1..=DAY, |c| &mut c.server.write_idle_max)),
    entry("server.body_idle_ms_max", Kind::Millis(1..=HOUR, |c| &mut c.server.body_idle_max)),
    entry("server.request_body_min_rate", Kind::Count(0..=MEBI, |c| &mut c.server.request_body_min_rate)),
    entry("server.response_min_rate", Kind::Count(0..=MEBI, |c| &mut c.server.response_min_rate)),
    entry("upstream.base_url", Kind::Word(|c| &mut c.upstream.base_url)),
    entry("upstream.ca_file", Kind::OptionalFile(|c| &mut c.upstream.ca_file)),
    entry("upstream.connect_ms_max", Kind::Millis(1..=10 * MINUTE, |c| &mut c.upstream.connect_max)),
    entry("upstream.first_byte_ms_max", Kind::Millis(1..=HOUR, |c| &mut c.upstream.first_byte_max)),
    entry("upstream.stream_idle_ms_max", Kind::Millis(1..=HOUR, |c| &mut c.upstream.stream_idle_max)),
    entry(
        "upstream.idle_connections_max",
        Kind::Count(0..=100_000, |c| &mut c.upstream.idle_connections_max),
    ),
    entry("upstream.idle_ms_max", Kind::Millis(1..=HOUR, |c| &mut c.upstream.idle_max)),
    entry("upstream.connection_age_ms_max", Kind::Millis(1..=DAY, |c| &mut c.upstream.connection_age_max)),
    entry("upstream.region_base_urls", Kind::Names(visitors::base_url, |c| &mut c.upstream.region_base_urls)),
    entry("pool.strategy", Kind::Word(|c| &mut c.pool.strategy)),
    entry("pool.reserve_credits", Kind::Count(0..=1_000_000_000, |c| &mut c.pool.reserve_credits)),
    entry("pool.wait_ms_max", Kind::Millis(0..=HOUR, |c| &mut c.pool.wait_max)),
    entry("pool.waiting_max", Kind::Count(0..=100_000, |c| &mut c.pool.waiting_max)),
    entry("pool.foresee_ms_max", Kind::Millis(0..=MINUTE, |c| &mut c.pool.foresee_max)),
    entry("pool.rate_limited_cooldown_ms", Kind::Millis(1..=DAY, |c| &mut c.pool.rate_limited_cooldown)),
    entry("pool.concurrency_cooldown_ms", Kind::Millis(1..=HOUR, |c| &mut c.pool.concurrency_cooldown)),
    entry("pool.exhausted_cooldown_ms", Kind::Millis(1..=31 * DAY, |c| &mut c.pool.exhausted_cooldown)),
    entry("pool.invalid_confirm_ms", Kind::Millis(1..=DAY, |c| &mut c.pool.invalid_confirm)),
    entry("pool.invalid_cooldown_ms", Kind::Millis(1..=31 * DAY, |c| &mut c.pool.invalid_cooldown)),
    entry("pool.permission_cooldown_ms", Kind::Millis(1..=31 * DAY, |c| &mut c.pool.permission_cooldown)),
    entry("pool.feature_cooldown_ms", Kind::Millis(1..=31 * DAY, |c| &mut c.pool.feature_cooldown)),
    entry("pool.endpoint_cooldown_ms", Kind::Millis(1..=31 * DAY, |c| &mut c.pool.endpoint_cooldown)),
    entry("pool.unproven_cooldown_ms", Kind::Millis(1..=HOUR, |c| &mut c.pool.unproven_cooldown)),
    entry("pool.max_retry_after_ms", Kind::Millis(1..=DAY, |c| &mut c.pool.max_retry_after)),
    entry("pool.probe_after_ms", Kind::Millis(1..=HOUR, |c| &mut c.pool.probe_after)),
    entry("pool.billing_cooldown_ms", Kind::Millis(1..=31 * DAY, |c| &mut c.pool.billing_cooldown)),
    entry("pool.near_limit_ratio", Kind::Ratio(|c| &mut c.pool.near_limit_ratio)),
    entry("replay.memory_max", Kind::Bytes(0..=GIBI, |c| &mut c.replay.memory_bytes_max)),
    entry("replay.memory_total_max", Kind::Bytes(0..=64 * GIBI, |c| &mut c.replay.memory_total_bytes_max)),
    entry("replay.disk_max", Kind::Bytes(0..=1024 * GIBI, |c| &mut c.replay.disk_bytes_max)),
    entry("replay.disk_total_max", Kind::Bytes(0..=16_384 * GIBI, |c| &mut c.replay.disk_total_bytes_max)),
    entry("replay.disk_free_percent_min", Kind::Count(0..=100, |c| &mut c.replay.disk_free_percent_min)),
    entry("replay.directory", Kind::File(|c| &mut c.replay.directory)),
    entry("replay.attempts_max", Kind::Count(1..=1000, |c| &mut c.replay.attempts_max)),
    entry("replay.deadline_ms", Kind::Millis(1..=HOUR, |c| &mut c.replay.deadline)),
    entry("replay.error_body_bytes_max", Kind::Bytes(1..=16 * MEBI, |c| &mut c.replay.error_body_bytes_max)),
    entry("replay.error_body_ms_max", Kind::Millis(1..=MINUTE, |c| &mut c.replay.error_body_max)),
    entry("watch.enabled", Kind::Switch(|c| &mut c.watch.is_enabled)),
    // A round asks once a key: more often than once a second would itself be rate limited.
    entry("watch.interval_ms", Kind::Millis(1000..=DAY, |c| &mut c.watch.interval)),
    entry("watch.timeout_ms", Kind::Millis(1..=10 * MINUTE, |c| &mut c.watch.timeout)),
    entry("watch.quota_lag_ms", Kind::Millis(1..=DAY, |c| &mut c.watch.quota_lag)),
    entry("storage.path", Kind::File(|c| &mut c.storage.path)),
    entry("storage.queue_records_max", Kind::Count(1..=MEBI, |c| &mut c.storage.queue_records_max)),
    entry("storage.commit_interval_ms", Kind::Millis(0..=MINUTE, |c| &mut c.storage.commit_interval)),
    entry("storage.attempts_kept_days_max", Kind::Count(0..=36_500, |c| &mut c.storage.attempts_kept_days)),
    entry("storage.hours_kept_days_max", Kind::Count(0..=36_500, |c| &mut c.storage.hours_kept_days)),
    entry("storage.ephemeral", Kind::Switch(|c| &mut c.storage.is_ephemeral)),
    entry("supabase.enabled", Kind::Switch(|c| &mut c.supabase.is_enabled)),
    entry("supabase.url", Kind::Word(|c| &mut c.supabase.url)),
    entry("supabase.secret_key_file", Kind::OptionalFile(|c| &mut c.supabase.secret_key_file)),
    entry("supabase.events", Kind::Switch(|c| &mut c.supabase.sends_events)),
    entry("supabase.interval_ms", Kind::Millis(100..=DAY, |c| &mut c.supabase.interval)),
    // PostgREST and what stands before it take a megabyte at least: a row is below 2 KiB.
    entry("supabase.batch_rows_max", Kind::Count(1..=10_000, |c| &mut c.supabase.batch_rows_max)),
    entry("supabase.connect_ms_max", Kind::Millis(1..=10 * MINUTE, |c| &mut c.supabase.connect_max)),
    entry("supabase.answer_ms_max", Kind::Millis(1..=10 * MINUTE, |c| &mut c.supabase.answer_max)),
    entry("supabase.retry_ms_max", Kind::Millis(1..=DAY, |c| &mut c.supabase.retry_max)),
    entry("supabase.pause_ms", Kind::Millis(1..=DAY, |c| &mut c.supabase.pause)),
    entry("supabase.final_push_ms_max", Kind::Millis(0..=HOUR, |c| &mut c.supabase.final_push_max)),
    entry("ownership.identifiers_max", Kind::Count(256..=100_000_000, |c| &mut c.ownership.identifiers_max)),
    entry("ownership.kept_days_max", Kind::Count(0..=36_500, |c| &mut c.ownership.kept_days)),
    entry("ownership.not_found_ttl_ms", Kind::Millis(0..=DAY, |c| &mut c.ownership.not_found_ttl)),
    entry("ownership.answer_bytes_max", Kind::Bytes(0..=64 * MEBI, |c| &mut c.ownership.answer_bytes_max)),
    entry("sockets.idle_ms_max", Kind::Millis(0..=DAY, |c| &mut c.sockets.idle_max)),
    entry("sockets.lifetime_ms_max", Kind::Millis(0..=31 * DAY, |c| &mut c.sockets.lifetime_max)),
    entry("sockets.opening_bytes_max", Kind::Bytes(0..=64 * MEBI, |c| &mut c.sockets.opening_bytes_max)),
    entry("sockets.frame_bytes_max", Kind::Bytes(1024..=64 * MEBI, |c| &mut c.sockets.frame_bytes_max)),
    entry("sockets.quiet_ms_max", Kind::Millis(1..=HOUR, |c| &mut c.sockets.quiet_max)),
    entry("sockets.introduction_ms_max", Kind::Millis(1..=MINUTE, |c| &mut c.sockets.introduction_max)),
    entry("sockets.max_session_buffer", Kind::Bytes(4096..=64 * MEBI, |c| &mut c.sockets.max_session_buffer)),
    entry("sockets.close_timeout", Kind::Millis(1..=MINUTE, |c| &mut c.sockets.close_timeout)),
    entry("sockets.quota_check_interval", Kind::Millis(1..=HOUR, |c| &mut c.sockets.quota_check_interval)),
    entry("sockets.signed_url_base", Kind::Word(|c| &mut c.sockets.signed_url_base)),
    entry("log.format", Kind::Word(|c| &mut c.log.format)),
    entry("log.level", Kind::Word(|c| &mut c.log.level)),
    entry("access.deny_dangerous", Kind::Switch(|c| &mut c.access.denies_dangerous)),
    entry("access.redact", Kind::Switch(|c| &mut c.access.redacts)),
    entry("access.unpriced_credits", Kind::Count(0..=1_000_000_000, |c| &mut c.access.unpriced_credits)),
    entry("access.max_unpriced_requests", Kind::Count(1..=MEBI, |c| &mut c.access.max_unpriced_requests)),
    entry("access.bring_your_own_key", Kind::Switch(|c| &mut c.access.brings_own_key)),
    entry("access.hosts", Kind::Names(visitors::host, |c| &mut c.access.hosts)),
    entry("access.origins", Kind::Names(visitors::origin, |c| &mut c.access.origins)),
    entry("access.forward_headers", Kind::Names(visitors::header, |c| &mut c.access.forwarded_headers)),
];

const fn entry(path: &'static str, kind: Kind) -> Setting {
    Setting { path, kind }
}

/// The setting of exactly this path.
pub(super) fn find(path: &str) -> Option<&'static Setting> {
    TABLE.iter().find(|setting| setting.path == path)
}

/// Whether settings live under this name.
pub(super) fn is_section(name: &str) -> bool {
    TABLE.iter().any(|setting| setting.section() == name)
}

/// The setting that a name without its section, or with a wrong one, may mean.
pub(super) fn of_name(name: &str) -> Option<&'static Setting> {
    TABLE.iter().find(|setting| setting.name() == name && !setting.is_nested())
}

impl Setting {
    /// The part of the path before the last dot.
    pub(super) fn section(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(section, _)| section)
    }

    /// The part of the path after the last dot.
    pub(super) fn name(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(_, name)| name)
    }

    /// Whether it is below another setting: its name alone means nothing.
    pub(super) fn is_nested(&self) -> bool {
        find(self.section()).is_some()
    }

    /// The environment variable that sets it.
    pub(super) fn variable(&self) -> String {
        format!("KEYCHOIR_{}", self.path.to_uppercase().replace('.', "__"))
    }

    /// Reads `raw` into the field of `config`, or leaves it as it is and says why.
    pub(super) fn read(
        &self,
        raw: Raw<'_>,
        folders: Folders<'_>,
        config: &mut Config,
    ) -> Result<(), WrongValue> {
        match &self.kind {
            Kind::Word(field) => field(config).set(text(raw)?),
            Kind::Tls(field) => match raw {
                Raw::Toml(value) if !value.is_str() => {
                    let near = value.as_bool().map(|is_on| if is_on { "\"auto\"" } else { "\"off\"" });
                    Err(wrong_type(value, "a text or a table").advise(tls::FORM).suggest(near))
                }
                Raw::Toml(_) | Raw::Text(_) => field(config).set(text(raw)?),
            },
            Kind::Places(field) => {
                *field(config) = Listens::parse(&texts(raw)?)?;
                Ok(())
            }
            Kind::Names(one, field) => {
                let names = texts(raw)?.into_iter().filter(|text| !text.is_empty()).map(one);
                *field(config) = names.collect::<Result<_, _>>()?;
                Ok(())
            }
            Kind::Millis(range, field) => {
                *field(config) = Duration::from_millis(self.whole(raw, range, &MILLISECONDS)?);
                Ok(())
            }
            Kind::Bytes(range, field) => {
                *field(config) = saturated(self.whole(raw, range, &BYTES)?);
                Ok(())
            }
            Kind::Count(range, field) => {
                *field(config) = saturated(self.whole(raw, range, &PIECES)?);
                Ok(())
            }
            Kind::Ratio(field) => {
                *field(config) = ratio(raw)?;
                Ok(())
            }
            Kind::Switch(field) => {
                *field(config) = switch(raw)?;
                Ok(())
            }
            Kind::File(field) => {
                *field(config) = folders.file(text(raw)?)?;
                Ok(())
            }
            Kind::OptionalFile(field) => {
                let text = text(raw)?;
                *field(config) = if text.trim().is_empty() { None } else { Some(folders.file(text)?) };
                Ok(())
            }
        }
    }

    /// The value in `config`, as a TOML file writes it.
    pub(super) fn show(&self, config: &mut Config) -> String {
        match &self.kind {
            Kind::Names(_, field) => {
                let names = field(config).iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>();
                format!("[{}]", names.join(", "))
            }
            Kind::Word(field) => format!("\"{}\"", field(config)),
            Kind::Tls(field) => format!("\"{}\"", field(config)),
            Kind::Places(field) => field(config).to_string(),
            Kind::Millis(_, field) => field(config).as_millis().to_string(),
            Kind::Bytes(_, field) | Kind::Count(_, field) => field(config).to_string(),
            Kind::Ratio(field) => field(config).to_string(),
            Kind::Switch(field) => field(config).to_string(),
            Kind::File(field) => format!("\"{}\"", field(config).display()),
            Kind::OptionalFile(field) => {
                format!("\"{}\"", field(config).as_deref().unwrap_or(Path::new("")).display())
            }
        }
    }

    fn whole(&self, raw: Raw<'_>, range: &RangeInclusive<u64>, unit: &Unit) -> Result<u64, WrongValue> {
        let (least, most) = (range.start(), range.end());
        let default = self.show(&mut Config::default());
        let allowed =
            format!("write a whole number{} from {least} to {most}; the default is {default}", unit.of);
        let number = whole_number(raw, unit).map_err(|wrong| wrong.advise(allowed.clone()))?;
        if range.contains(&number) {
            return Ok(number);
        }
        let size = if number < *least { "small" } else { "large" };
        Err(WrongValue::new(format!("{number} is too {size} for `{}`", self.path)).advise(allowed))
    }
}

/// A value that is read from text and printed back.
trait Word: fmt::Display {
    fn set(&mut self, text: &str) -> Result<(), WrongValue>;
}

impl<T: FromStr<Err = WrongValue> + fmt::Display> Word for T {
    fn set(&mut self, text: &str) -> Result<(), WrongValue> {
        *self = text.parse()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use toml::de::DeValue;

    use super::*;

    /// Reads `toml` (a value as a file writes it) into the setting and shows what it became.
    #[track_caller]
    fn check_toml(path: &str, toml: &str, expected: &str) {
        let value = DeValue::parse(toml).unwrap();
        check(path, Raw::Toml(value.get_ref()), expected);
    }

    #[track_caller]
    fn check_text(path: &str, text: &str, expected: &str) {
        check(path, Raw::Text(text), expected);
    }

    #[track_caller]
    fn check(path: &str, raw: Raw<'_>, expected: &str) {
        let folders = Folders { base: Some(Path::new("/etc/k")), home: Some(Path::new("/home/me")) };
        let mut config = Config::default();
        let setting = find(path).unwrap();
        let shown = match setting.read(raw, folders, &mut config) {
            Ok(()) => setting.show(&mut config),
            Err(wrong) => format!("! {wrong}"),
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn paths_are_unique_and_have_one_section() {
        for (index, setting) in TABLE.iter().enumerate() {
            let parts = if setting.is_nested() { 3 } else { 2 };
            assert_eq!(setting.path.split('.').count(), parts, "{}", setting.path);
            assert!(TABLE[..index].iter().all(|other| other.path != setting.path), "{}", setting.path);
        }
    }

    #[test]
    fn each_setting_changes_its_own_field() {
        // For every kind of setting one value at least that is not its default.
        const SAMPLES: [&str; 15] = [
            "/below",
            "9999",
            "999",
            "99",
            "0.5",
            "true",
            "false",
            "json",
            "trace",
            "https://h",
            "wss://h",
            "127.0.0.1:1",
            "0600",
            "off",
            "round-robin",
        ];
        for setting in TABLE {
            let changed_by = |text: &str| -> Vec<&str> {
                let (mut config, mut fresh) = (Config::default(), Config::default());
                let _ = setting.read(Raw::Text(text), Folders::default(), &mut config);
                let differs = |other: &&Setting| other.show(&mut config) != other.show(&mut fresh);
                TABLE.iter().filter(differs).map(|other| other.path).collect()
            };
            let changed: Vec<_> =
                SAMPLES.into_iter().map(changed_by).filter(|paths| !paths.is_empty()).collect();
            assert!(!changed.is_empty(), "{}", setting.path);
            assert!(changed.iter().all(|paths| *paths == [setting.path]), "{changed:?}");
        }
    }

    #[test]
    fn every_default_is_within_its_limits() {
        for setting in TABLE {
            let mut config = Config::default();
            let default = setting.show(&mut config);
            let value = DeValue::parse(&default).unwrap();
            setting.read(Raw::Toml(value.get_ref()), Folders::default(), &mut config).unwrap();
            assert_eq!(setting.show(&mut config), default);
        }
    }

    #[test]
    fn several_places_are_a_list_in_a_file_and_have_commas_elsewhere() {
        let both = "[\"127.0.0.1:1\", \"unix:/k\"]";
        check_toml("server.listen", both, both);
        check_toml("server.listen", "\"127.0.0.1:1\"", "\"127.0.0.1:1\"");
        check_text("server.listen", "127.0.0.1:1 , unix:/k", both);
        check_toml("server.listen", "[1]", "! this is a number and should be a text; write it in quotes");
        check_text(
            "server.listen",
            "127.0.0.1:1,",
            "! `` has no port; write HOST:PORT, for example 127.0.0.1:11011",
        );
    }

    #[test]
    fn variables_nest_with_two_underscores() {
        assert_eq!(find("server.listen").unwrap().variable(), "KEYCHOIR_SERVER__LISTEN");
        assert_eq!(find("upstream.base_url").unwrap().variable(), "KEYCHOIR_UPSTREAM__BASE_URL");
    }

    #[test]
    fn numbers_are_read_in_every_spelling_of_toml() {
        for toml in ["30000", "30_000", "+30000", "0x7530"] {
            check_toml("server.head_read_ms_max", toml, "30000");
        }
        check_text("server.head_read_ms_max", "30_000", "30000");
    }

    #[test]
    fn workers_are_counted_or_as_many_as_there_are_cores() {
        check_toml("server.workers", "0", "0");
        check_text("server.workers", "1024", "1024");
        let allowed = "write a whole number from 0 to 1024; the default is 0";
        check_toml("server.workers", "1025", &format!("! 1025 is too large for `server.workers`; {allowed}"));
    }

    #[test]
    fn both_sides_of_a_limit() {
        let allowed = "write a whole number of bytes from 8192 to 1048576; the default is 65536";
        check_toml("server.head_bytes_max", "8192", "8192");
        check_toml(
            "server.head_bytes_max",
            "8191",
            &format!("! 8191 is too small for `server.head_bytes_max`; {allowed}"),
        );
        check_text("server.head_bytes_max", "1048576", "1048576");
        check_text(
            "server.head_bytes_max",
            "1048577",
            &format!("! 1048577 is too large for `server.head_bytes_max`; {allowed}"),
        );
        check_toml(
            "server.head_bytes_max",
            "99999999999999999999999",
            &format!("! the number is too large; {allowed}"),
        );
        check_toml("server.shutdown_grace_ms", "0", "0");
        check_toml("upstream.idle_connections_max", "0", "0");
        check_toml("replay.memory_max", "0", "0");
    }

    #[test]
    fn what_is_no_whole_number_says_so() {
        let allowed = "write a whole number of milliseconds from 1 to 600000; the default is 10000";
        for (toml, what) in [
            ("-1", "the number is negative"),
            ("1.5", "a number with a fraction is no whole number"),
            ("\"30s\"", "a number is written without quotes; did you mean `30000`?"),
            ("\"x\"", "a number is written without quotes"),
            ("true", "this is true or false and should be a number"),
            ("[1]", "this is a list and should be a number"),
            ("0", "0 is too small for `upstream.connect_ms_max`"),
        ] {
            check_toml("upstream.connect_ms_max", toml, &format!("! {what}; {allowed}"));
        }
        for (text, what) in [
            ("-1", "the number is negative"),
            ("1.5", "`1.5` is no whole number"),
            ("5 min", "`5 min` is no whole number; did you mean `300000`?"),
            ("_", "`_` is no whole number"),
        ] {
            check_text("upstream.connect_ms_max", text, &format!("! {what}; {allowed}"));
        }
    }

    #[test]
    fn sizes_are_guessed_in_bytes() {
        for (text, bytes) in [("64k", "65536"), ("1 MiB", "1048576"), ("1GB", "1073741824")] {
            let allowed = "write a whole number of bytes from 0 to 1073741824; the default is 16777216";
            let what = format!("`{text}` is no whole number; did you mean `{bytes}`?");
            check_text("replay.memory_max", text, &format!("! {what}; {allowed}"));
        }
    }

    #[test]
    fn a_ratio_is_above_0_and_up_to_1() {
        const FORM: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
        check_toml("pool.near_limit_ratio", "1", "1");
        check_toml("pool.near_limit_ratio", "1.0", "1");
        check_text("pool.near_limit_ratio", "0.01", "0.01");
        check_toml(
            "pool.near_limit_ratio",
            "80",
            &format!("! the ratio is above 1; {FORM}; did you mean `0.8`?"),
        );
        for toml in ["0", "0.0", "-0.5", "nan", "inf", "101"] {
            check_toml("pool.near_limit_ratio", toml, &format!("! the ratio is out of range; {FORM}"));
        }
        check_text("pool.near_limit_ratio", "80%", &format!("! this is no number; {FORM}"));
    }

    #[test]
    fn switches_are_true_or_false() {
        check_toml("watch.enabled", "false", "false");
        check_text("watch.enabled", "true", "true");
        check_text(
            "watch.enabled",
            "yes",
            "! `yes` is neither true nor false; write `true` or `false`; did you mean `true`?",
        );
        check_toml(
            "watch.enabled",
            "\"off\"",
            "! `true` and `false` are written without quotes; write `true` or `false`; did you mean `false`?",
        );
        check_toml(
            "watch.enabled",
            "1",
            "! this is a number and should be `true` or `false`; write `true` or `false`",
        );
    }

    #[test]
    fn paths_are_relative_to_where_they_are_written() {
        check_toml("storage.path", "\"a.db\"", "\"/etc/k/a.db\"");
        check_toml("storage.path", "\"/a.db\"", "\"/a.db\"");
        check_toml("storage.path", "\"~/a.db\"", "\"/home/me/a.db\"");
        check_toml("storage.path", "\" \"", "! the path is empty");
        check_toml("storage.path", "3", "! this is a number and should be a text; write it in quotes");
        assert!(Folders::default().file("~/a").is_err());
        assert_eq!(Folders::default().file("a").unwrap(), Path::new("a"));
    }
}
