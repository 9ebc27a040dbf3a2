//! Lists the Redis commands that a replica uses, and builds the `ACL SETUSER` command that permits only them.
//! `keychoir check --online` prints that command, and an operator runs it in Redis.

use super::LinkSettings;

/// The commands that replicas send directly or in scripts. HELLO is not listed, because it needs no permission.
pub(super) const COMMANDS: [&str; 17] = [
    "eval",
    "get",
    "set",
    "del",
    "hget",
    "hset",
    "hdel",
    "hmget",
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

/// Returns the `ACL SETUSER` command that creates the Redis user `keychoir` with the permissions that a replica
/// needs. The password is the placeholder `PASSWORD`.
#[must_use]
pub fn acl_setuser_command(settings: &LinkSettings) -> String {
    let pattern = settings.pool.access_pattern();
    // A replica sends SELECT only for a database other than 0.
    let select = (settings.url.database != 0).then_some("select");
    let commands: Vec<String> =
        COMMANDS.into_iter().chain(select).map(|command| format!("+{command}")).collect();
    format!(
        "ACL SETUSER keychoir on >PASSWORD resetkeys ~{pattern} resetchannels &{pattern} -@all {}",
        commands.join(" ")
    )
}
