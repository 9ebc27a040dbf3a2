"""Builds the image of `Dockerfile` with buildah and without a network. Checks the size of the image, and runs the
program in it with `--version`.

No registry is used, so the script makes the base image itself, with the name of the real one. This base image is almost
empty: the Rust toolchain, the C compiler and the downloaded crates of this machine are mounted into it. The script
needs the user root, buildah and rustup. It ends with an error if a step fails.
"""

import os
import pathlib
import re
import shutil
import tempfile

from conftest import ROOT, run
from test_images import MAX_IMAGE_SIZE, Buildah

BUILD_TIMEOUT_SECONDS = 3600


def make_base_image(buildah, folder, base_name):
    """Makes an image with folders and links, into which the tools of this machine are mounted."""
    for name in ["usr", "etc/alternatives", "tmp", "rust", "cargo/registry"]:
        (folder / name).mkdir(parents=True)
    for name in ["bin", "lib", "lib64", "sbin"]:
        (folder / name).symlink_to(f"usr/{name}")
    container = buildah("from", "scratch").strip()
    buildah("copy", container, folder, "/")
    environment = ["PATH=/rust/bin:/usr/bin:/bin", "CARGO_HOME=/cargo", "CARGO_NET_OFFLINE=true"]
    buildah("config", *(word for variable in environment for word in ("--env", variable)), container)
    buildah("commit", "--format", "docker", container, f"docker.io/library/{base_name}")


def main():
    base_name = re.search(r"^FROM (\S+) AS build$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    channel = re.search(r'channel = "(.*)"', (ROOT / "rust-toolchain.toml").read_text())[1]
    rustc = run("rustup", "which", "--toolchain", channel, "rustc", environment=dict(os.environ)).stdout.strip()
    cargo_home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    mounts = {
        "/usr": "/usr",
        "/etc/alternatives": "/etc/alternatives",
        pathlib.Path(rustc).parents[1]: "/rust",
        cargo_home / "registry": "/cargo/registry",
    }
    folder = pathlib.Path(tempfile.mkdtemp(prefix="keychoir-image-"))
    try:
        buildah = Buildah(folder, timeout=BUILD_TIMEOUT_SECONDS)
        make_base_image(buildah, folder / "base", base_name)
        volumes = [word for source, target in mounts.items() for word in ("--volume", f"{source}:{target}:ro")]
        image = buildah.build(ROOT, "Dockerfile", "keychoir-built", None, *volumes)
        size = image.archive(folder / "image.tar").stat().st_size
        assert size <= MAX_IMAGE_SIZE, f"the image must have at most {MAX_IMAGE_SIZE} bytes, not {size}"
        root = image.copy_root(folder / "root")
        version = run("chroot", root, "/keychoir", "--version").stdout.strip()
        print(f"{version} in an image of {size / 1e6:.1f} MB")
    finally:
        shutil.rmtree(folder)


main()
