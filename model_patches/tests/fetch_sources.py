"""Download the released vLLM sources that the contract tests read: `python fetch_sources.py FOLDER [VERSION ...]`.

pip prepares an sdist's metadata before it keeps the file, so this needs an environment with setuptools,
setuptools_scm, setuptools_rust, wheel, numpy, packaging, ninja, cmake, jinja2, regex and torch. Only the package's
Python files are kept. An archive with another checksum is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SHA256 = {
    "0.24.0": "0862453adc1f3339f1a0c9dca1179c34d6ed6e118f87b6e5bddd120af614ac66",
    "0.32.0": "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
    "0.33.0": "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
}


def download(version: str, folder: Path) -> Path:
    """The sdist of `version`, in `folder`."""
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"vllm=={version}"]
    subprocess.run(command, check=True, env=environment)
    return next(folder.glob(f"vllm-{version}*.tar.gz"))


def unpack(archive: Path, version: str, target: Path) -> None:
    """Keep the package's Python files as target/vllm-<version>/vllm/**.py.

    Raises: SystemExit for an archive that is not the released one.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256[version]:
        raise SystemExit(f"{archive.name} has sha256 {digest}, not {SHA256[version]}: not the released file, refused")
    part = target / f".vllm-{version}.part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        root = f"vllm-{version}/vllm/"
        wanted = [m for m in tar if m.isfile() and m.name.startswith(root) and m.name.endswith(".py")]
        tar.extractall(part, members=wanted, filter="data")
    shutil.rmtree(target / f"vllm-{version}", ignore_errors=True)
    (part / f"vllm-{version}").rename(target / f"vllm-{version}")
    part.rmdir()


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-") or not set(arguments[1:]) <= SHA256.keys():
        raise SystemExit(f"{__doc__}\nversions: {', '.join(SHA256)}")
    target = Path(arguments[0])
    target.mkdir(parents=True, exist_ok=True)
    for version in arguments[1:] or SHA256:
        if (target / f"vllm-{version}" / "vllm" / "__init__.py").is_file():
            print(f"vllm {version}: there already")
            continue
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(version, Path(folder)), version, target)
        print(f"vllm {version}: unpacked to {target / f'vllm-{version}'}")


if __name__ == "__main__":
    main(sys.argv[1:])
