//! The cases of unusual timings and orders of requests: pipelined, trickled, incomplete and stalled requests, and
//! clients that disconnect.

use super::{AfterSending, CaseTable, ClientOutcome, Forwarded, TOKEN, get_with, post_head};

/// Returns the bytes of a text as one chunk.
fn one_chunk(text: String) -> Vec<Vec<u8>> {
    vec![text.into_bytes()]
}

/// Returns each byte of a text as a chunk.
fn byte_by_byte(text: &str) -> Vec<Vec<u8>> {
    text.bytes().map(|byte| vec![byte]).collect()
}

pub(super) fn add_timings(table: &mut CaseTable) {
    add_pipelined_requests(table);
    add_trickled_requests(table);
    add_incomplete_requests(table);
    add_disconnects(table);
    add_stalled_requests(table);
}

fn add_pipelined_requests(table: &mut CaseTable) {
    table.add(
        "three pipelined requests",
        get_with("").repeat(3),
        AfterSending::HalfClose,
        &[200, 200, 200],
        Forwarded::Complete(3),
    );
    table.add(
        "a valid request before a malformed one",
        format!("{}nonsense\r\n\r\n{}", get_with(""), get_with("")),
        AfterSending::ReadToEnd,
        &[200, 400],
        Forwarded::Complete(1),
    );
    table.add(
        "a request after connection: close",
        format!("{}{}", get_with("connection: close\r\n"), get_with("")),
        AfterSending::ReadToEnd,
        &[200],
        Forwarded::Complete(1),
    );
    let body = format!("{}hello{}", post_head("content-length: 5\r\n\r\n"), get_with(""));
    table.add("a request after a body", body, AfterSending::HalfClose, &[200, 200], Forwarded::Complete(2));
}

fn add_trickled_requests(table: &mut CaseTable) {
    table.add_chunks(
        "a request byte by byte",
        byte_by_byte(&get_with("")),
        AfterSending::SendAnotherRequest,
        ClientOutcome::Responses(&[200, 200]),
        Forwarded::Complete(2),
    );
    let chunked = format!("{}5\r\nhello\r\n0\r\n\r\n", post_head("transfer-encoding: chunked\r\n\r\n"));
    table.add_chunks(
        "chunks byte by byte",
        byte_by_byte(&chunked),
        AfterSending::SendAnotherRequest,
        ClientOutcome::Responses(&[200, 200]),
        Forwarded::Complete(2),
    );
    let expecting = post_head("expect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    table.add_chunks(
        "a body that waits for 100 Continue",
        vec![expecting.clone().into_bytes(), b"hello".to_vec()],
        AfterSending::SendAnotherRequest,
        ClientOutcome::Responses(&[100, 200, 200]),
        Forwarded::Complete(2),
    );
    table.add(
        "an unknown expectation",
        get_with("expect: 200-ok\r\n"),
        AfterSending::SendAnotherRequest,
        &[200, 200],
        Forwarded::Complete(2),
    );
    let refused_upload = expecting.replacen(TOKEN, "wrong", 1);
    table.add(
        "a body that waits for 100 Continue and is refused",
        refused_upload,
        AfterSending::HalfClose,
        &[401],
        Forwarded::Nothing,
    );
}

fn add_incomplete_requests(table: &mut CaseTable) {
    for (name, incomplete) in [
        ("an incomplete head", get_with("")[..40].to_owned()),
        ("an incomplete body", format!("{}he", post_head("content-length: 5\r\n\r\n"))),
        ("an incomplete chunk", format!("{}5\r\nhe", post_head("transfer-encoding: chunked\r\n\r\n"))),
        (
            "chunks without the last chunk",
            format!("{}5\r\nhello\r\n", post_head("transfer-encoding: chunked\r\n\r\n")),
        ),
    ] {
        let (outcome, forwarded) = match name {
            "an incomplete head" => (ClientOutcome::Closed, Forwarded::Nothing),
            _ => (ClientOutcome::Responses(&[400]), Forwarded::Partial),
        };
        table.add_chunks(name, one_chunk(incomplete.clone()), AfterSending::HalfClose, outcome, forwarded);
        for after_sending in [AfterSending::Disconnect, AfterSending::Reset] {
            table.add_chunks(
                name,
                one_chunk(incomplete.clone()),
                after_sending,
                ClientOutcome::NotRead,
                forwarded,
            );
        }
    }
}

fn add_disconnects(table: &mut CaseTable) {
    table.add_chunks(
        "a connection without bytes",
        Vec::new(),
        AfterSending::HalfClose,
        ClientOutcome::Closed,
        Forwarded::Nothing,
    );
    table.add_chunks(
        "a connection without bytes, and a reset",
        Vec::new(),
        AfterSending::Reset,
        ClientOutcome::NotRead,
        Forwarded::Nothing,
    );
    for after_sending in [AfterSending::Disconnect, AfterSending::Reset] {
        table.add_chunks(
            "responses that are not read",
            one_chunk(get_with("").repeat(50)),
            after_sending,
            ClientOutcome::NotRead,
            Forwarded::Complete(50),
        );
        table.add_chunks(
            "a complete body",
            one_chunk(format!("{}hello", post_head("content-length: 5\r\n\r\n"))),
            after_sending,
            ClientOutcome::NotRead,
            Forwarded::Complete(1),
        );
    }
}

fn add_stalled_requests(table: &mut CaseTable) {
    table.add_chunks(
        "an incomplete head that stalls",
        one_chunk(get_with("")[..40].to_owned()),
        AfterSending::ReadToEnd,
        ClientOutcome::Closed,
        Forwarded::Nothing,
    );
    let incomplete_body = format!("{}he", post_head("content-length: 5\r\n\r\n"));
    table.add_chunks(
        "an incomplete body that stalls",
        one_chunk(incomplete_body),
        AfterSending::ReadToEnd,
        ClientOutcome::Responses(&[408]),
        Forwarded::Partial,
    );
}
