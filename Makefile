# Everything a developer or a fresh machine needs. `make test` installs what the tests talk to:
# the official SDKs, voice frameworks, Autobahn's cases, schemathesis and PostgREST, into folders that git
# ignores. PostgreSQL and the forward proxies tinyproxy and microsocks come with the system.

PYTHON ?= python3
VENV := tests/sdk/python/.venv
FRAMEWORKS := tests/sdk/frameworks/.venv
SOCKETS := tests/sockets/.venv
API := tests/api/.venv
PEERS := benches/compare/.venv
NODE := tests/sdk/js
SUPABASE := tests/supabase

# A virtual environment with the packages of the file beside it.
define packages
	$(PYTHON) -m venv $(dir $@)
	$(dir $@)bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
endef

.PHONY: check test test-rust test-model test-cost record-cost test-sdk test-frameworks test-sockets test-api postgrest build demo clean deny faults mutations bench bench-compare fuzz units

check:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo check --locked --manifest-path fuzz/Cargo.toml --no-default-features --target-dir target/fuzz
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --lib

test: test-rust test-model test-cost test-sdk test-frameworks test-sockets test-api

test-rust: postgrest
	cargo test --locked

# The pool's state under every order in which threads may meet.
test-model:
	RUSTFLAGS="--cfg keychoir_model" CARGO_TARGET_DIR=target/model cargo test --locked --lib pool::model

# Instructions of the pure parts of a request's way, counted by valgrind, against benches/cost/bounds.txt.
test-cost:
	@command -v valgrind >/dev/null || { echo "test-cost needs valgrind: apt-get install valgrind"; exit 1; }
	cargo bench --locked --profile cost --bench cost

# What they take now becomes what they may take.
record-cost:
	cargo bench --locked --profile cost --bench cost -- --record

# What the tests of the mirror write through.
postgrest: $(SUPABASE)/node_modules/.installed

# The systemd units in systemd's own judgement; needs the package `systemd`.
units:
	cargo test --locked --test units

# The real clients against the real binary.
test-sdk: build $(VENV)/.installed $(NODE)/node_modules/.installed
	KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir $(VENV)/bin/python -m pytest tests/sdk/python -q
	cd $(NODE) && KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir node --test

# LiveKit's and Pipecat's clients.
test-frameworks: build $(FRAMEWORKS)/.installed
	KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir $(FRAMEWORKS)/bin/python -m pytest tests/sdk/frameworks -q

# Autobahn's cases through Keychoir and past it; `make faults` has all of them.
test-sockets: build $(SOCKETS)/.installed
	$(SOCKETS)/bin/python tests/sockets/conformance.py target/debug/keychoir

# Generated requests to the admin API against docs/openapi.json, by schemathesis.
test-api: build $(API)/.installed
	$(API)/bin/python tests/api/conformance.py target/debug/keychoir

build:
	cargo build --locked

$(VENV)/.installed: tests/sdk/python/requirements.txt
	$(packages)

$(SOCKETS)/.installed: tests/sockets/requirements.txt
	$(packages)

$(API)/.installed: tests/api/requirements.txt
	$(packages)

$(PEERS)/.installed: benches/compare/requirements.txt
	$(packages)

# These name every package that is imported, and leave hundreds of megabytes of others out.
$(FRAMEWORKS)/.installed: tests/sdk/frameworks/requirements.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(NODE)/node_modules/.installed: $(NODE)/package.json $(NODE)/package-lock.json
	cd $(NODE) && npm ci --no-audit --no-fund
	touch $@

$(SUPABASE)/node_modules/.installed: $(SUPABASE)/package.json $(SUPABASE)/package-lock.json
	cd $(SUPABASE) && npm ci --no-audit --no-fund
	touch $@

demo:
	cargo run --locked --release -- demo

# Licences, sources and duplicates; needs `cargo install cargo-deny`.
deny:
	cargo deny check bans licenses sources

# Faults that take longer than a test may: every case of Autobahn; uploads up to 1 GB, refused at
# every moment; floods of clients, of connections and of failures; sessions that go wrong in every
# way; disks that fail, for which it mounts a tmpfs and runs strace where it can; a hundred kills
# under load. Last come mutations of hostile clients and providers, until one is a fault or it is
# interrupted; FAULTS_ROUNDS=1 ends it after a thousand of each.
FAULTS_LARGEST_MB ?= 1000
FAULTS_KILLS ?= 100

faults: $(SOCKETS)/.installed
	cargo build --locked --release
	$(SOCKETS)/bin/python tests/sockets/conformance.py target/release/keychoir --all
	$(PYTHON) tests/faults/overload.py target/release/keychoir
	$(PYTHON) tests/faults/sockets.py target/release/keychoir
	$(PYTHON) tests/faults/disk.py target/release/keychoir
	KEYCHOIR_KILLS=$(FAULTS_KILLS) cargo test --locked --test crashes -- --nocapture
	$(PYTHON) tests/faults/uploads.py target/release/keychoir $(FAULTS_LARGEST_MB)
	$(MAKE) mutations

# Rounds of mutations; empty for rounds without end.
FAULTS_ROUNDS ?=
FAULTS_MUTATIONS ?= 1000

# Each round begins at a new seed, which a failure prints with how to run it again.
mutations:
	cargo test --locked --no-run --test proxy
	round=0; while [ "$$round" != "$(FAULTS_ROUNDS)" ]; do \
		KEYCHOIR_MUTATIONS=$(FAULTS_MUTATIONS) cargo test --locked --test proxy mutations || exit 1; \
		round=$$((round + 1)); \
	done

# The cost of the pure parts of a request, of the selection of a key, of usage records, of a log line and of a
# WebSocket session; the client half of HTTP/1.1 beside hyper's; and Keychoir beside other proxies.
bench: bench-compare
	cargo bench --locked --bench pure
	cargo bench --locked --bench pool
	cargo bench --locked --bench usage_records
	cargo bench --locked --bench log_line
	cargo bench --locked --bench sockets
	cargo bench --locked --bench client_half

# nginx and HAProxy come with the system; peers that are not there are left out, and so is Pingora when
# it cannot be built.
bench-compare: $(PEERS)/.installed
	-PATH="$(CURDIR)/$(PEERS)/bin:$$PATH" cargo build --locked --release \
		--manifest-path benches/compare/pingora/Cargo.toml --target-dir target/pingora
	cargo bench --locked --bench compare

# Seconds for each fuzz target.
FUZZ_SECONDS ?= 60

# Needs `cargo install cargo-fuzz`; the sanitizer needs a flag of the compiler that is not stable.
fuzz:
	for target in head response replay classify blanking frames; do \
		RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

clean:
	cargo clean
	rm -rf $(VENV) $(FRAMEWORKS) $(SOCKETS) $(API) $(PEERS) $(NODE)/node_modules $(SUPABASE)/node_modules
