//! The commands that a replica sends, and the line of Redis' access control that permits them and nothing else.

use super::LinkSettings;

/// The commands of replicas, by themselves and in scripts. HELLO needs no permission.
pub(super) const COMMANDS: [&str; 16] = [
    "eval",
    "get",
    "set",
    "del",
    "hget",
    "hset",
    "hdel",
    "hgetall",
    "hincrby",
    "hlen",
    "pexpire",
    "pttl",
    "time",
    "publish",
    "subscribe",
    "ping",
];

/// Returns the command for Redis that creates the user `keychoir` with the permissions that a replica needs. The
/// password is the placeholder `PASSWORD`.
#[must_use]
pub fn acl_line(settings: &LinkSettings) -> String {
    let pattern = settings.pool.access_pattern();
    let select = (settings.url.database != 0).then_some("select");
    let commands: Vec<String> =
        COMMANDS.into_iter().chain(select).map(|command| format!("+{command}")).collect();
    format!(
        "ACL SETUSER keychoir on >PASSWORD resetkeys ~{pattern} resetchannels &{pattern} -@all {}",
        commands.join(" ")
    )
}
