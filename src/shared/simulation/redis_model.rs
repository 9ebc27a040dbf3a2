//! Models Redis: runs the scripts of the program in Lua 5.1, which Redis also uses, and implements the commands of the
//! scripts on data in memory and on virtual time. A simulation can break a rule of a script, flush the data, and
//! restore a snapshot.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use mlua::{Function, Lua, MultiValue, Table, Value as LuaValue, Variadic};
use redis::Value;

use super::super::scripts::ScriptCall;

/// The value of a key, with the time at which it expires.
#[derive(Clone, Debug)]
struct StoredValue {
    content: StoredContent,
    expires_ms: Option<u64>,
}

/// The content of a value, of the two types that the scripts use.
#[derive(Clone, Debug)]
enum StoredContent {
    Text(String),
    Hash(BTreeMap<String, String>),
}

/// All keys of the server, which a failover restores.
#[derive(Clone, Debug, Default)]
pub(super) struct RedisSnapshot {
    keys: BTreeMap<String, StoredValue>,
}

/// The keys, the clock and the published messages of the server.
#[derive(Debug, Default)]
struct RedisContent {
    data: RedisSnapshot,
    /// The time in microseconds since 1970.
    now_micros: u64,
    /// A digest of all calls and their times.
    digest: u64,
    /// The published messages that were not taken yet.
    published: Vec<String>,
}

/// The reply of a command to a script.
enum CommandReply {
    Status,
    Missing,
    Integer(i64),
    Text(String),
    List(Vec<String>),
    Fields(Vec<Option<String>>),
}

impl RedisContent {
    fn now_ms(&self) -> u64 {
        self.now_micros / 1_000
    }

    /// Returns the value of a key, unless the key has expired.
    fn find(&mut self, key: &str) -> Option<&mut StoredValue> {
        let now = self.now_ms();
        if self.data.keys.get(key).is_some_and(|stored| stored.expires_ms.is_some_and(|at| at <= now)) {
            self.data.keys.remove(key);
        }
        self.data.keys.get_mut(key)
    }

    /// Returns the fields of a hash, or `None` without the key. Panics for another type, because Redis would refuse the
    /// command.
    fn hash(&mut self, key: &str) -> Option<&mut BTreeMap<String, String>> {
        match &mut self.find(key)?.content {
            StoredContent::Hash(fields) => Some(fields),
            StoredContent::Text(_) => panic!("the key {key} must have the type that the command requires"),
        }
    }

    /// Returns the fields of a hash, which is created if it does not exist.
    fn hash_or_new(&mut self, key: &str) -> &mut BTreeMap<String, String> {
        if self.find(key).is_none() {
            let content = StoredContent::Hash(BTreeMap::new());
            self.data.keys.insert(key.to_owned(), StoredValue { content, expires_ms: None });
        }
        self.hash(key).unwrap()
    }

    /// Runs a command of a script.
    fn run(&mut self, command: &[String]) -> CommandReply {
        let parts: Vec<&str> = command.iter().map(String::as_str).collect();
        let count = |number: usize| CommandReply::Integer(i64::try_from(number).unwrap());
        let text = |value: Option<String>| value.map_or(CommandReply::Missing, CommandReply::Text);
        match *parts {
            ["TIME"] => {
                let (seconds, micros) = (self.now_micros / 1_000_000, self.now_micros % 1_000_000);
                CommandReply::List(vec![seconds.to_string(), micros.to_string()])
            }
            ["HSET", key, ref pairs @ ..] if pairs.len() % 2 == 0 && !pairs.is_empty() => {
                let fields = self.hash_or_new(key);
                let added = pairs.chunks_exact(2).filter(|pair| {
                    let before = fields.insert(pair[0].to_owned(), pair[1].to_owned());
                    before.is_none()
                });
                count(added.count())
            }
            ["HMGET", key, ref names @ ..] => {
                let fields = self.hash(key);
                let value = |name: &&str| fields.as_ref().and_then(|fields| fields.get(*name).cloned());
                CommandReply::Fields(names.iter().map(value).collect())
            }
            ["HGET", key, field] => text(self.hash(key).and_then(|fields| fields.get(field).cloned())),
            ["HGETALL", key] => CommandReply::List(self.hash(key).map_or_else(Vec::new, |fields| {
                fields.iter().flat_map(|(field, value)| [field.clone(), value.clone()]).collect()
            })),
            ["HDEL", key, field] => {
                let fields = self.hash(key);
                let is_empty =
                    fields.as_ref().is_some_and(|fields| fields.len() == 1 && fields.contains_key(field));
                let removed = fields.and_then(|fields| fields.remove(field)).is_some();
                if is_empty {
                    self.data.keys.remove(key);
                }
                count(usize::from(removed))
            }
            ["HLEN", key] => count(self.hash(key).map_or(0, |fields| fields.len())),
            ["HINCRBY", key, field, by] => {
                let by: i64 = by.parse().unwrap();
                let stored = self.hash_or_new(key).entry(field.to_owned()).or_insert_with(|| "0".to_owned());
                let sum = stored.parse::<i64>().unwrap() + by;
                *stored = sum.to_string();
                CommandReply::Integer(sum)
            }
            ["GET", key] => text(self.find(key).map(|stored| match &stored.content {
                StoredContent::Text(text) => text.clone(),
                StoredContent::Hash(_) => {
                    panic!("the key {key} must have the type that the command requires")
                }
            })),
            ["SET", key, value, "PX", ttl] => {
                let expires_ms = Some(self.now_ms() + ttl.parse::<u64>().unwrap());
                let content = StoredContent::Text(value.to_owned());
                self.data.keys.insert(key.to_owned(), StoredValue { content, expires_ms });
                CommandReply::Status
            }
            ["DEL", key] => {
                let existed = self.find(key).is_some();
                self.data.keys.remove(key);
                count(usize::from(existed))
            }
            ["PEXPIRE", key, ttl] => {
                let expires_ms = self.now_ms() + ttl.parse::<u64>().unwrap();
                let stored = self.find(key);
                let exists = stored.is_some();
                stored.into_iter().for_each(|stored| stored.expires_ms = Some(expires_ms));
                count(usize::from(exists))
            }
            ["PTTL", key] => {
                let now = self.now_ms();
                CommandReply::Integer(match self.find(key) {
                    None => -2,
                    Some(stored) => {
                        stored.expires_ms.map_or(-1, |at| i64::try_from(at.saturating_sub(now)).unwrap())
                    }
                })
            }
            ["PUBLISH", _, message] => {
                self.published.push(message.to_owned());
                count(0)
            }
            _ => panic!("no script may use the command {parts:?}"),
        }
    }
}

/// The model of a Redis server.
#[derive(Debug)]
pub(super) struct SimulatedRedis {
    lua: Lua,
    functions: RefCell<HashMap<&'static str, Function>>,
    state: Rc<RefCell<RedisContent>>,
    /// A text in the scripts, and the text that replaces it.
    mutation: Option<(&'static str, &'static str)>,
}

impl SimulatedRedis {
    pub(super) fn new() -> Self {
        Self::with_mutation(None)
    }

    /// Creates a server on which one rule of a script is broken.
    pub(super) fn with_mutation(mutation: Option<(&'static str, &'static str)>) -> Self {
        let lua = Lua::new();
        let state = Rc::new(RefCell::new(RedisContent::default()));
        let content = Rc::clone(&state);
        let call = lua.create_function(move |lua, parts: Variadic<LuaValue>| {
            let command: Vec<String> = parts.iter().map(command_part).collect();
            to_lua(lua, content.borrow_mut().run(&command))
        });
        let table = lua.create_table().unwrap();
        table.set("call", call.unwrap()).unwrap();
        lua.globals().set("redis", table).unwrap();
        Self { lua, functions: RefCell::default(), state, mutation }
    }

    /// Sets the time of the server, in microseconds since 1970.
    pub(super) fn set_time(&self, micros: u64) {
        self.state.borrow_mut().now_micros = micros;
    }

    /// Runs a script and returns its reply.
    pub(super) fn run(&self, call: &ScriptCall) -> Value {
        let mut state = self.state.borrow_mut();
        let mut hasher = DefaultHasher::new();
        (state.digest, state.now_micros, &call.keys, &call.arguments).hash(&mut hasher);
        state.digest = hasher.finish();
        drop(state);
        let globals = self.lua.globals();
        globals.set("KEYS", call.keys.clone()).unwrap();
        globals.set("ARGV", call.arguments.clone()).unwrap();
        let mut functions = self.functions.borrow_mut();
        let function = functions
            .entry(call.script)
            .or_insert_with(|| {
                let script = match self.mutation {
                    Some((from, to)) => call.script.replace(from, to),
                    None => call.script.to_owned(),
                };
                self.lua.load(script).into_function().unwrap()
            })
            .clone();
        drop(functions);
        let reply: MultiValue = function.call(()).unwrap();
        from_lua(&reply.into_iter().next().unwrap_or(LuaValue::Nil))
    }

    /// Returns a digest of all calls and their times.
    pub(super) fn digest(&self) -> u64 {
        self.state.borrow().digest
    }

    /// Returns the fields of a hash.
    pub(super) fn hash_fields(&self, key: &str) -> Value {
        let mut state = self.state.borrow_mut();
        let bulk = |text: &String| Value::BulkString(text.clone().into_bytes());
        Value::Map(state.hash(key).map_or_else(Vec::new, |fields| {
            fields.iter().map(|(field, value)| (bulk(field), bulk(value))).collect()
        }))
    }

    pub(super) fn publish(&self, message: String) {
        self.state.borrow_mut().published.push(message);
    }

    /// Returns the messages that were published since the last call.
    pub(super) fn take_published(&self) -> Vec<String> {
        std::mem::take(&mut self.state.borrow_mut().published)
    }

    /// Removes all keys.
    pub(super) fn flush(&self) {
        self.state.borrow_mut().data = RedisSnapshot::default();
    }

    pub(super) fn snapshot(&self) -> RedisSnapshot {
        self.state.borrow().data.clone()
    }

    pub(super) fn restore(&self, data: RedisSnapshot) {
        self.state.borrow_mut().data = data;
    }
}

/// Converts an argument of `redis.call` to text by the rules of Redis.
#[expect(clippy::cast_possible_truncation, reason = "scripts use whole numbers below 2^53")]
#[expect(clippy::wildcard_enum_match_arm, reason = "the scripts use no other types")]
fn command_part(value: &LuaValue) -> String {
    match value {
        LuaValue::String(text) => text.to_string_lossy(),
        LuaValue::Integer(number) => number.to_string(),
        LuaValue::Number(number) => (*number as i64).to_string(),
        other => panic!("a command must consist of texts and numbers, not {other:?}"),
    }
}

/// Converts the reply of a command to the value that a script receives from Redis.
fn to_lua(lua: &Lua, reply: CommandReply) -> mlua::Result<LuaValue> {
    Ok(match reply {
        CommandReply::Missing => LuaValue::Boolean(false),
        CommandReply::Integer(number) => LuaValue::Integer(number),
        CommandReply::Text(text) => LuaValue::String(lua.create_string(text)?),
        CommandReply::List(texts) => LuaValue::Table(lua.create_sequence_from(texts)?),
        CommandReply::Fields(fields) => {
            let value = |field: Option<String>| match field {
                Some(text) => lua.create_string(text).map(LuaValue::String),
                None => Ok(LuaValue::Boolean(false)),
            };
            let values = fields.into_iter().map(value).collect::<mlua::Result<Vec<_>>>()?;
            LuaValue::Table(lua.create_sequence_from(values)?)
        }
        CommandReply::Status => {
            let table: Table = lua.create_table()?;
            table.set("ok", "OK")?;
            LuaValue::Table(table)
        }
    })
}

/// Converts the result of a script by the rules of Redis: numbers are truncated, and lists end at the first `nil`.
#[expect(clippy::cast_possible_truncation, reason = "Redis truncates in the same way")]
#[expect(clippy::wildcard_enum_match_arm, reason = "the scripts use no other types")]
fn from_lua(value: &LuaValue) -> Value {
    match value {
        LuaValue::Nil | LuaValue::Boolean(false) => Value::Nil,
        LuaValue::Boolean(true) => Value::Int(1),
        LuaValue::Integer(number) => Value::Int(*number),
        LuaValue::Number(number) => Value::Int(*number as i64),
        LuaValue::String(text) => Value::BulkString(text.as_bytes().to_vec()),
        LuaValue::Table(table) => Value::Array(
            table.sequence_values::<LuaValue>().map(|element| from_lua(&element.unwrap())).collect(),
        ),
        other => panic!("a script must not return {other:?}"),
    }
}
