//! Queues the messages that Redis pushes over a connection, in bounded memory. The client library fills the queue, and
//! `open_link.rs` reads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redis::aio::SendError;
use redis::{PushInfo, PushKind, Value};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// Maximum number of queued messages. Replicas publish a few messages per second.
const MAX_QUEUED_MESSAGES: usize = 256;
/// Maximum size of a queued message in bytes. Together with [`MAX_QUEUED_MESSAGES`], it bounds the memory that another
/// program can use by publishing on the channel. A larger message, such as a very large overlay, counts as missed, and
/// the replica reads the map instead.
const MAX_MESSAGE_SIZE: usize = 64 * 1024;

/// An event on the channel of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Push {
    /// A message that a replica published.
    Message(Vec<u8>),
    /// Messages were dropped, because they were too large or arrived faster than they were read.
    Missed,
}

/// Receives the messages of the channels to which a connection is subscribed.
#[derive(Debug)]
pub struct Pushes {
    queue: mpsc::Receiver<Push>,
    has_missed: Arc<AtomicBool>,
}

impl Pushes {
    /// Returns the next event, or `None` after the connection has ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no message.
    pub async fn next(&mut self) -> Option<Push> {
        if self.has_missed.swap(false, Ordering::Relaxed) {
            return Some(Push::Missed);
        }
        self.queue.recv().await
    }
}

/// Creates a queue. Returns the function that fills it and the receiver. The queue ends when the function is dropped.
pub(super) fn create_queue() -> (impl Fn(PushInfo) -> Result<(), SendError> + Send + Sync + 'static, Pushes) {
    let (sender, queue) = mpsc::channel(MAX_QUEUED_MESSAGES);
    let has_missed = Arc::new(AtomicBool::new(false));
    let sender_has_missed = Arc::clone(&has_missed);
    let push = move |info: PushInfo| {
        let Some(event) = parse_push(info) else { return Ok(()) };
        match sender.try_send(event) {
            Ok(()) => Ok(()),
            // The receiver reads the flag before the next of the queued messages.
            Err(TrySendError::Full(_)) => {
                sender_has_missed.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(TrySendError::Closed(_)) => Err(SendError),
        }
    };
    (push, Pushes { queue, has_missed })
}

/// Returns the event of a message. Returns `None` for other pushes, such as the confirmation of a subscription.
fn parse_push(info: PushInfo) -> Option<Push> {
    if info.kind != PushKind::Message {
        return None;
    }
    // The data of a message is the channel and then the payload.
    let Some(Value::BulkString(payload)) = info.data.into_iter().nth(1) else { return None };
    Some(if payload.len() > MAX_MESSAGE_SIZE { Push::Missed } else { Push::Message(payload) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(payload: Vec<u8>) -> PushInfo {
        let data = vec![Value::BulkString(b"channel".to_vec()), Value::BulkString(payload)];
        PushInfo { kind: PushKind::Message, data }
    }

    #[tokio::test]
    async fn messages_arrive_in_order_until_the_connection_ends() {
        let (push, mut pushes) = create_queue();
        push(message(b"a".to_vec())).unwrap();
        push(PushInfo { kind: PushKind::Subscribe, data: vec![] }).unwrap();
        push(PushInfo { kind: PushKind::Message, data: vec![Value::Nil] }).unwrap();
        push(message(b"b".to_vec())).unwrap();
        drop(push);
        assert_eq!(pushes.next().await, Some(Push::Message(b"a".to_vec())));
        assert_eq!(pushes.next().await, Some(Push::Message(b"b".to_vec())));
        assert_eq!(pushes.next().await, None);
    }

    #[tokio::test]
    async fn messages_beyond_the_bounds_are_reported_as_missed() {
        let (push, mut pushes) = create_queue();
        push(message(vec![0; MAX_MESSAGE_SIZE])).unwrap();
        push(message(vec![0; MAX_MESSAGE_SIZE + 1])).unwrap();
        assert_eq!(pushes.next().await, Some(Push::Message(vec![0; MAX_MESSAGE_SIZE])));
        assert_eq!(pushes.next().await, Some(Push::Missed));
        for _ in 0..=MAX_QUEUED_MESSAGES {
            push(message(b"a".to_vec())).unwrap();
        }
        assert_eq!(pushes.next().await, Some(Push::Missed), "a lost message must be reported");
        for _ in 0..MAX_QUEUED_MESSAGES {
            assert_eq!(pushes.next().await, Some(Push::Message(b"a".to_vec())));
        }
        drop(pushes);
        assert!(push(message(b"a".to_vec())).is_err(), "a push must fail after the receiver was dropped");
    }
}
