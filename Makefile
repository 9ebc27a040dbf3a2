# Runs the checks, tests, benchmarks and fuzz targets, and builds the static program and the packages. `make check test`
# runs most of the checks of a pull request. The others are `make units`, `make test-packages` and
# `make check-platforms`.
#
# The targets install the packages that they need into directories that git ignores: the official SDKs, the voice
# frameworks, the Autobahn cases, schemathesis, PostgREST, and the proxies of the comparison. The package manager of the
# system must install PostgreSQL, tinyproxy, microsocks, redis-server, redis-sentinel and haproxy.

PYTHON ?= python3
VENV := tests/sdk/python/.venv
FRAMEWORKS := tests/sdk/frameworks/.venv
SOCKETS := tests/sockets/.venv
API := tests/api/.venv
PEERS := benches/compare/.venv
NODE := tests/sdk/js
WEB := tests/web
SUPABASE := tests/supabase
SHIP := tests/ship/.venv
MACHINE := $(shell uname -m)
WORKFLOWS := tests/ship/.workflows-venv

# Creates the virtual environment of the target with the packages of its requirements file.
define packages
	$(PYTHON) -m venv $(dir $@)
	$(dir $@)bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
endef

.PHONY: check test test-web test-ship test-ship-quick test-image test-image-aarch64 test-image-build static static-x86_64 static-aarch64 test-rust test-model test-cost record-cost test-sdk test-frameworks test-sockets test-api postgrest build demo demo-replicas clean deny faults mutations bench bench-compare bench-replicas bench-dashboard fuzz units packages dist test-packages check-platforms first-run simulation

check:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo check --locked --manifest-path fuzz/Cargo.toml --no-default-features --target-dir target/fuzz
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --lib

test: test-rust test-model test-cost test-sdk test-frameworks test-sockets test-api test-ship-quick test-web

test-rust: postgrest
	cargo test --locked

# Checks the concurrent state of the pool under all thread interleavings.
test-model:
	RUSTFLAGS="--cfg keychoir_model" CARGO_TARGET_DIR=target/model cargo test --locked --lib pool::model

# Counts the instructions of each step of the request path without I/O with valgrind, and compares them with
# benches/cost/bounds.txt.
test-cost:
	@command -v valgrind >/dev/null || { echo "test-cost needs valgrind: apt-get install valgrind"; exit 1; }
	cargo bench --locked --profile cost --bench cost

# Records the measured counts as the new bounds.
record-cost:
	cargo bench --locked --profile cost --bench cost -- --record

# Installs PostgREST. The tests of the Supabase mirror write to PostgreSQL through its REST API.
postgrest: $(SUPABASE)/node_modules/.installed

# Verifies the systemd units with `systemd-analyze`, which needs the package `systemd`.
units:
	cargo test --locked --test units

# Runs the official Python and JavaScript SDKs against the binary.
test-sdk: build $(VENV)/.installed $(NODE)/node_modules/.installed
	KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir $(VENV)/bin/python -m pytest tests/sdk/python -q
	cd $(NODE) && KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir node --test --test-force-exit

# Runs the ElevenLabs clients of LiveKit and Pipecat against the binary.
test-frameworks: build $(FRAMEWORKS)/.installed
	KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir $(FRAMEWORKS)/bin/python -m pytest tests/sdk/frameworks -q

# Runs the quick Autobahn cases for WebSockets with and without Keychoir, and compares their results. `make faults` runs
# all cases.
test-sockets: build $(SOCKETS)/.installed
	$(SOCKETS)/bin/python tests/sockets/conformance.py target/debug/keychoir

# Sends requests that schemathesis generates to the admin API, and compares the responses with docs/openapi.json.
test-api: build $(API)/.installed
	$(API)/bin/python tests/api/conformance.py target/debug/keychoir

# Tests the dashboard in Chromium. The package manager of the system must install `chromium`.
test-web: build $(WEB)/node_modules/.installed
	@command -v chromium >/dev/null || { echo "test-web needs chromium: apt-get install chromium"; exit 1; }
	cd $(WEB) && KEYCHOIR_BIN=$(CURDIR)/target/debug/keychoir node --test --test-force-exit

# Tests all parts of a release: the static program, the images and deploy/ (`test-ship-quick`), and the packages.
test-ship: test-ship-quick test-packages

# Runs the static program and both images in separate root directories, and validates deploy/, as a part of `make test`.
# The images and root directories need the user root, buildah and busybox-static. Without them, these tests are skipped,
# and the last lines of the output contain the reasons. With TESTS_SKIP_NOTHING=1, they fail instead. The program is a
# debug build, which is linked statically in a few seconds and is not small. `make test-image` runs the same tests with
# the released program.
test-ship-quick: $(SHIP)/.installed
	cargo rustc --locked --bin keychoir -- -C target-feature=+crt-static
	mkdir -p target/ship
	cp target/debug/keychoir target/ship/keychoir
	KEYCHOIR_STATIC_BIN=$(CURDIR)/target/ship/keychoir $(SHIP)/bin/python -m pytest tests/ship -q -rs

# Runs the tests of `make test-ship-quick` with the program of `make static`, and checks its size. It is not a part of
# `make test`, because the release build takes several minutes.
test-image: static $(SHIP)/.installed
	KEYCHOIR_RELEASE=1 KEYCHOIR_STATIC_BIN=$(CURDIR)/dist/keychoir-$(MACHINE)-linux $(SHIP)/bin/python -m pytest tests/ship -q -rs

# Runs the tests of `make test-image` for arm64, with a program that a cross compiler builds and an emulator runs. It
# needs the packages of `make static-aarch64` and qemu-user-static. It is not a part of `make test`, because the build
# is slow.
test-image-aarch64: static-aarch64 $(SHIP)/.installed
	KEYCHOIR_RELEASE=1 KEYCHOIR_STATIC_BIN=$(CURDIR)/dist/keychoir-aarch64-linux \
		KEYCHOIR_EMULATOR=$$(command -v qemu-aarch64-static) $(SHIP)/bin/python -m pytest tests/ship -q -rs

# Builds the image of `Dockerfile` with the Rust toolchain and the C compiler of this machine. It is not a part of
# `make test`, because the build is slow.
test-image-build: $(SHIP)/.installed
	$(SHIP)/bin/python tests/ship/build_image.py

# Builds the static program for Linux in dist/. It needs no library, certificate or other file of the machine.
# `--target` is needed also for the target of this machine, because procedural macros cannot be linked statically. The
# second flag makes the program read random bytes by a system call. Without it, they would be read from /dev/urandom,
# because a static program does not find the function of glibc by its name (getrandom 0.4). The third flag packs the
# relocations, which makes the program 350 kB smaller. The program must be built with glibc 2.36 or newer, which applies
# packed relocations at the start. `dist/state` is the empty directory that an image needs for its volume.
STATIC_FLAGS := -C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom" -C link-arg=-Wl,-z,pack-relative-relocs

static: static-$(MACHINE)

static-x86_64 static-aarch64: static-%:
	RUSTFLAGS='$(STATIC_FLAGS)' CARGO_PROFILE_RELEASE_STRIP=symbols \
		cargo build --locked --release --bin keychoir --target $*-unknown-linux-gnu --target-dir target/static
	mkdir -p dist/state
	cp target/static/$*-unknown-linux-gnu/release/keychoir dist/keychoir-$*-linux
	$(if $(filter $(MACHINE),$*),dist/keychoir-$*-linux --version)

# A machine with another processor than arm64 needs a cross compiler:
# rustup target add aarch64-unknown-linux-gnu && apt-get install gcc-aarch64-linux-gnu
ifneq ($(MACHINE),aarch64)
static-aarch64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER = aarch64-linux-gnu-gcc
endif

build:
	cargo build --locked

$(VENV)/.installed: tests/sdk/python/requirements.txt
	$(packages)

$(SOCKETS)/.installed: tests/sockets/requirements.txt
	$(packages)

$(API)/.installed: tests/api/requirements.txt
	$(packages)

$(SHIP)/.installed: tests/ship/requirements.txt
	$(packages)

$(WORKFLOWS)/.installed: tests/ship/workflows.requirements.txt
	$(packages)

$(PEERS)/.installed: benches/compare/requirements.txt
	$(packages)

# The requirements file names every imported package. `--no-deps` avoids hundreds of megabytes of packages that are
# not imported.
$(FRAMEWORKS)/.installed: tests/sdk/frameworks/requirements.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(NODE)/node_modules/.installed: $(NODE)/package.json $(NODE)/package-lock.json
	cd $(NODE) && npm ci --no-audit --no-fund
	touch $@

$(WEB)/node_modules/.installed: $(WEB)/package.json $(WEB)/package-lock.json
	cd $(WEB) && npm ci --no-audit --no-fund
	touch $@

$(SUPABASE)/node_modules/.installed: $(SUPABASE)/package.json $(SUPABASE)/package-lock.json
	cd $(SUPABASE) && npm ci --no-audit --no-fund
	touch $@

# Runs Keychoir in front of the simulator until keys are exhausted.
demo:
	cargo demo

# Clones the repository, builds it with an empty target directory and runs the demo. Prints the duration of each step.
first-run:
	$(PYTHON) tests/ship/first_run.py

# The build profile of the packages: `release` for releases, or `demo`, which is built faster, for tests.
PACKAGE_PROFILE ?= release
PACKAGE_PROGRAM = target/$(PACKAGE_PROFILE)/keychoir
TOOLS := target/tools
CARGO_DEB := 3.8.0
CARGO_GENERATE_RPM := 0.21.1

# Builds the .deb, the .rpm and the tarball of this machine's architecture, and writes them into dist/.
packages: $(TOOLS)/cargo-deb-$(CARGO_DEB) $(TOOLS)/cargo-generate-rpm-$(CARGO_GENERATE_RPM)
	cargo build --locked --profile $(PACKAGE_PROFILE)
	deploy/packages/stage $(PACKAGE_PROGRAM)
	mkdir -p dist
	rm -f dist/*.deb dist/*.rpm
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" cargo deb --locked --no-build --strip --profile $(PACKAGE_PROFILE) --output dist
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" cargo generate-rpm --profile $(PACKAGE_PROFILE) --output dist
	deploy/packages/tarball $(PACKAGE_PROGRAM) $$(rustc --print host-tuple)

# Builds the packages and their checksums.
dist: packages
	deploy/packages/checksums

# The tools are built without optimizations, because their build takes longer than their runs.
$(TOOLS)/cargo-deb-$(CARGO_DEB):
	cargo install --locked --debug --root $(TOOLS) --target-dir $(TOOLS)/build --no-default-features cargo-deb@$(CARGO_DEB)
	touch $@

$(TOOLS)/cargo-generate-rpm-$(CARGO_GENERATE_RPM):
	cargo install --locked --debug --root $(TOOLS) --target-dir $(TOOLS)/build cargo-generate-rpm@$(CARGO_GENERATE_RPM)
	touch $@

# Installs, upgrades, removes and purges the .deb in a separate root directory, which needs the user root, debootstrap
# and lintian. Checks the .rpm, the tarball, the Homebrew formula and the Nix flake, which needs rpm, ruby and nix-bin.
# Checks the versions and the workflows. A check whose programs are missing is skipped, and fails with
# TESTS_SKIP_NOTHING=1. The target is not a part of `make test`, because it builds cargo-deb and cargo-generate-rpm.
test-packages: $(WORKFLOWS)/.installed
	$(PYTHON) tests/ship/versions.py
	$(WORKFLOWS)/bin/python tests/ship/workflows.py
	$(MAKE) dist PACKAGE_PROFILE=demo
	$(PYTHON) tests/ship/packages.py dist

# Type-checks the Rust code for macOS and Windows. Targets that are not installed are skipped:
# `rustup target add x86_64-apple-darwin aarch64-apple-darwin x86_64-pc-windows-gnu` installs all of them.
check-platforms:
	$(PYTHON) tests/ship/platforms.py

# Runs two replicas with redis-server and haproxy, and kills one of them under load (deploy/replicas/README.md).
demo-replicas:
	cargo build --locked --release
	$(PYTHON) deploy/replicas/demo/demo.py target/release/keychoir

# Checks the licences, the sources and the duplicates of crates. It needs `cargo install cargo-deny`.
deny:
	cargo deny check bans licenses sources

# Number of seeds of the simulation of several replicas, and of the simulation with 50 replicas and 200 workspaces.
SIMULATION_SEEDS ?= 200
SIMULATION_LARGE_SEEDS ?= 1

# Simulates several replicas with virtual time (src/shared/simulation.rs). A seed takes up to a minute, and a seed with
# 50 replicas takes much longer.
simulation:
	KEYCHOIR_SIMULATION_SEEDS=$(SIMULATION_SEEDS) KEYCHOIR_SIMULATION_LARGE_SEEDS=$(SIMULATION_LARGE_SEEDS) \
		cargo test --locked --lib shared::simulation

# Runs the fault tests that take too long for `make test`:
# - all Autobahn cases
# - overload by clients and connections, and a failing provider
# - misbehaving WebSocket sessions
# - a full, read-only or failing disk, with a tmpfs and `strace` if they are available
# - 100 kills under load
# - three replicas while Redis or a replica is lost
# - simulated replicas
# - uploads of up to 1 GB that are refused before, during and after the body
# Finally it runs mutations of hostile clients and providers until one fails. FAULTS_ROUNDS=1 stops after one round.

# Maximum size of an upload in MB.
FAULTS_LARGEST_MB ?= 1000
# Number of kills under load.
FAULTS_KILLS ?= 100
# Duration of each phase of the replicas in seconds.
FAULTS_PHASE_SECONDS ?= 10

faults: $(SOCKETS)/.installed
	cargo build --locked --release
	$(SOCKETS)/bin/python tests/sockets/conformance.py target/release/keychoir --all
	$(PYTHON) tests/faults/overload.py target/release/keychoir
	$(PYTHON) tests/faults/sockets.py target/release/keychoir
	$(PYTHON) tests/faults/disk.py target/release/keychoir
	KEYCHOIR_KILLS=$(FAULTS_KILLS) cargo test --locked --test crashes -- --nocapture
	$(PYTHON) tests/faults/replicas.py target/release/keychoir $(FAULTS_PHASE_SECONDS)
	$(MAKE) simulation
	$(PYTHON) tests/faults/uploads.py target/release/keychoir $(FAULTS_LARGEST_MB)
	$(MAKE) mutations

# Number of rounds of mutations, or empty for no limit, and number of mutations per round.
FAULTS_ROUNDS ?=
FAULTS_MUTATIONS ?= 1000

# Runs mutations of hostile clients and providers. Each round uses a new seed. A failed test prints the seed and the
# command that repeats it.
mutations:
	cargo test --locked --no-run --test proxy
	round=0; while [ "$$round" != "$(FAULTS_ROUNDS)" ]; do \
		KEYCHOIR_MUTATIONS=$(FAULTS_MUTATIONS) cargo test --locked --test proxy mutations || exit 1; \
		round=$$((round + 1)); \
	done

# Measures the steps of a request without I/O, the key selection, the usage records, the log lines, the WebSocket
# sessions, the HTTP/1.1 client compared with hyper's, Keychoir compared with other proxies, replicas with and without
# Redis, and the dashboard.
bench: bench-compare bench-replicas bench-dashboard
	cargo bench --locked --bench pure
	cargo bench --locked --bench pool
	cargo bench --locked --bench usage_records
	cargo bench --locked --bench log_line
	cargo bench --locked --bench sockets
	cargo bench --locked --bench client_half

# Compares Keychoir with other proxies. The package manager of the system must install nginx and HAProxy. Proxies that
# are not installed are skipped, and Pingora is skipped if it cannot be built.
bench-compare: $(PEERS)/.installed
	-PATH="$(CURDIR)/$(PEERS)/bin:$$PATH" cargo build --locked --release \
		--manifest-path benches/compare/pingora/Cargo.toml --target-dir target/pingora
	cargo bench --locked --bench compare

# Counts the commands of Redis, and compares the latency of replicas with and without Redis. It needs redis-server.
bench-replicas:
	cargo bench --locked --bench compare -- replica-commands replica-latency

# Compares the latency of requests with and without 20 open tabs of the dashboard, measures the memory of its pages, and
# measures the pages with 10 million attempts of 1,000 keys in the database, which needs 4 GB of disk space.
bench-dashboard:
	cargo build --locked --release --bin keychoir
	$(PYTHON) benches/dashboard.py target/release/keychoir
	$(PYTHON) benches/large_database.py target/release/keychoir

# Duration of each fuzz target in seconds.
FUZZ_SECONDS ?= 60

# Runs each fuzz target. It needs `cargo install cargo-fuzz`. RUSTC_BOOTSTRAP permits the unstable compiler flag of the
# sanitizer.
fuzz:
	for target in head response replay classify blanking frames; do \
		RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

# Removes the build results and all packages that the targets have installed.
clean:
	cargo clean
	rm -rf dist $(SHIP) $(WORKFLOWS) $(VENV) $(FRAMEWORKS) $(SOCKETS) $(API) $(PEERS) $(NODE)/node_modules $(SUPABASE)/node_modules
