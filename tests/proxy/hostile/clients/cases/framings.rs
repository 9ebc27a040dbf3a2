//! The cases of requests whose end the proxy and its provider could determine differently: conflicting lengths and
//! transfer codings, malformed chunks, and requests that are smuggled in a body. Most of them must be refused, and
//! unusual but unambiguous framings must be served.

use super::{AfterSending, CaseTable, Forwarded, TOKEN, get_with, post_head, valid_request};

pub(super) fn add_framings(table: &mut CaseTable) {
    let smuggled = valid_request("/v1/voices?smuggled=1", "");
    let chunked = |chunks: &str| format!("{}{chunks}", post_head("transfer-encoding: chunked\r\n\r\n"));
    for (name, headers) in [
        (
            "a content-length before a transfer-encoding",
            "content-length: 4\r\ntransfer-encoding: chunked\r\n",
        ),
        (
            "a transfer-encoding before a content-length",
            "transfer-encoding: chunked\r\ncontent-length: 4\r\n",
        ),
        ("two content-lengths", "content-length: 0\r\ncontent-length: 5\r\n"),
        ("two content-lengths in a list", "content-length: 0, 5\r\n"),
        ("a signed content-length", "content-length: +5\r\n"),
        ("a content-length above 2^64", "content-length: 99999999999999999999\r\n"),
        ("a space between content-length and its colon", "content-length : 0\r\n"),
        ("an unknown transfer coding", "transfer-encoding: xchunked\r\n"),
        ("chunked before another transfer coding", "transfer-encoding: chunked, identity\r\n"),
        ("two chunked transfer codings", "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n"),
        ("a vertical tab before chunked", "transfer-encoding: \x0bchunked\r\n"),
        ("a space between transfer-encoding and its colon", "transfer-encoding : chunked\r\n"),
        ("a folded transfer-encoding", "transfer-encoding:\r\n chunked\r\n"),
        ("a folded header", "x-folded: a\r\n b\r\n"),
        ("a content-length after a bare CR", "x-a: b\rcontent-length: 5\r\n"),
        ("a NUL in a header value", "x-a: b\0content-length: 5\r\n"),
    ] {
        table.add_refused(name, post_head(&format!("{headers}\r\n")), &[400]);
    }
    table.add_refused("chunked with HTTP/1.0", chunked("0\r\n\r\n").replace("HTTP/1.1", "HTTP/1.0"), &[400]);
    for (name, chunks) in [
        ("a chunk size above 2^64", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size of 2^64", "10000000000000000\r\n\r\n"),
        ("a signed chunk size", "+5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with the prefix 0x", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("an empty chunk size", "\r\nhello\r\n0\r\n\r\n"),
        ("a chunk longer than its size", "2\r\nhello\r\n0\r\n\r\n"),
        ("a chunk that ends with a bare LF", "5\r\nhello\n0\r\n\r\n"),
        ("a chunk size that ends with a bare CR", "5\rhello\r\n0\r\n\r\n"),
    ] {
        // The request may have been forwarded up to the malformed chunk.
        let bytes = format!("{}{smuggled}", chunked(chunks));
        table.add(name, bytes, AfterSending::ReadToEnd, &[400], Forwarded::Partial);
    }
    let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(100_000));
    table.add(
        "an endless chunk extension",
        chunked(&long),
        AfterSending::ReadToEnd,
        &[400],
        Forwarded::Partial,
    );
    let many = format!("{}0\r\n\r\n", "1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n".repeat(2_000));
    table.add("many chunk extensions", chunked(&many), AfterSending::ReadToEnd, &[400], Forwarded::Partial);
    let trailers = format!("0\r\n{}\r\n", "x-a: b\r\n".repeat(10_000));
    table.add("endless trailers", chunked(&trailers), AfterSending::ReadToEnd, &[400], Forwarded::Partial);
    table.add_served(
        "a NUL in a chunk extension, which is not forwarded",
        chunked("5;\0\r\nhello\r\n0\r\n\r\n"),
    );
    table.add_served("a chunk extension", chunked("5;a=b\r\nhello\r\n0\r\n\r\n"));
    table.add_served("chunk sizes with leading zeros", chunked("00005\r\nhello\r\n0000\r\n\r\n"));
    table.add_served("many small chunks", chunked(&format!("{}0\r\n\r\n", "1\r\nx\r\n".repeat(3_000))));
    table.add_served(
        "trailers",
        chunked(&format!("5\r\nhello\r\n0\r\nxi-api-key: {TOKEN}\r\ncontent-length: 9\r\n\r\n")),
    );
    table.add_served(
        "a request as a body",
        format!("{}{smuggled}", post_head(&format!("content-length: {}\r\n\r\n", smuggled.len()))),
    );
    table.add_served(
        "a request as the body of a GET",
        format!("{}{smuggled}", get_with(&format!("content-length: {}\r\n", smuggled.len()))),
    );
    table.add_served(
        "two equal content-lengths",
        format!("{}hello", post_head("content-length: 5\r\ncontent-length: 5\r\n\r\n")),
    );
    table.add_served(
        "chunked in upper case",
        format!("{}5\r\nhello\r\n0\r\n\r\n", post_head("Transfer-Encoding: CHUNKED\r\n\r\n")),
    );
    table.add_served("lines that end with a bare LF", get_with("x-a: b\r\n").replace("\r\n", "\n"));
    table.add_served(
        "a content-length that Connection lists",
        format!("{}hello", post_head("connection: content-length\r\ncontent-length: 5\r\n\r\n")),
    );
    table.add_served("a credential that Connection lists", get_with("connection: xi-api-key, host\r\n"));
}
