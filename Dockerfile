# Builds Keychoir from the sources into an image that contains only the program and the folder of its volume.
#
#     docker build --build-arg VERSION="$(git describe --always)" --build-arg REVISION="$(git rev-parse HEAD)" -t keychoir .
#     docker run --read-only -v keychoir:/var/lib/keychoir -p 11011:11011 \
#         -v "$PWD/secrets:/run/secrets:ro" \
#         -e ELEVENLABS_API_KEYS_FILE=/run/secrets/elevenlabs_api_keys \
#         -e KEYCHOIR_CLIENT_TOKEN_FILE=/run/secrets/client_token keychoir
#
# `Dockerfile.prebuilt` makes the same image from the program that `make static` has built.
# The Rust version is that of rust-toolchain.toml. If a build must be repeatable, add the digest of the base image:
# rust:TAG@sha256:...

FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /build

# `+crt-static` links glibc into the program. It needs `--target`, because procedural macros cannot be static. The other
# flags are explained in the Makefile.
ENV RUSTFLAGS="-C target-feature=+crt-static --cfg getrandom_backend=\"linux_getrandom\" -C link-arg=-Wl,-z,pack-relative-relocs" \
    CARGO_INCREMENTAL=0 \
    CARGO_PROFILE_RELEASE_STRIP=symbols

# The dependencies are built in a separate layer, which a change of the sources does not invalidate. The tables of tests
# and benchmarks are removed from the manifest, because their files are not in the context.
COPY .cargo/config.toml .cargo/config.toml
COPY Cargo.toml Cargo.lock ./
RUN sed -i '/^\[\[test\]\]/,/^$/d; /^\[\[bench\]\]/,/^$/d' Cargo.toml \
    && mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && cargo build --locked --release --target "$(rustc --print host-tuple)"

COPY config config
COPY src src
# The files of the context can be older than the empty files that were built above, and cargo compares the times.
RUN touch src/main.rs src/lib.rs \
    && cargo build --locked --release --target "$(rustc --print host-tuple)" \
    && mkdir -p /out/state \
    && cp "target/$(rustc --print host-tuple)/release/keychoir" /out/keychoir

FROM scratch

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Keychoir" \
      org.opencontainers.image.description="Transparent reverse proxy with one base URL for all your ElevenLabs API keys" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

COPY --from=build --chown=65532:65532 /out/state /var/lib/keychoir
COPY --from=build /out/keychoir /keychoir

# Everything that is written is in the volume, so that the root can be read-only. The last two values are those of
# systemd/keychoir.service: glibc returns freed memory.
ENV KEYCHOIR_SERVER__LISTEN=0.0.0.0:11011 \
    KEYCHOIR_STORAGE__PATH=/var/lib/keychoir/keychoir.db \
    KEYCHOIR_RETRY__SPILL_DIRECTORY=/var/lib/keychoir \
    TMPDIR=/var/lib/keychoir \
    MALLOC_MMAP_THRESHOLD_=65536 \
    MALLOC_TRIM_THRESHOLD_=131072

USER 65532:65532
VOLUME ["/var/lib/keychoir"]
EXPOSE 11011
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["/keychoir", "healthcheck"]
ENTRYPOINT ["/keychoir"]
CMD ["serve"]
