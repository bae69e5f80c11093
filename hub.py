"""The repository that Hugging Face's kernel hub takes, from the sources of the package: ``python hub.py [FOLDER]``.

``build.toml`` and ``torch-ext/gradkernels`` are what kernel-builder starts from, ``build/torch-<backend>`` are what
it makes of them: the package again, beside a ``metadata.json``. The hub's client imports a variant under the ``id``
in there, under which the package registers its operators too, so that any number of copies fit into one process.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent
NAME = "gradkernels"
FOLDERS = ("build", "torch-ext")
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")
VERSION = int(re.findall(r'^__version__ = "(\d+)', (ROOT / "kernels" / "__init__.py").read_text(), re.M)[0])
BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "mit"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
pyext = ["json", "py"]
"""


def write(folder: Path) -> None:
    """Write the repository into ``folder``, in place of an earlier one.

    Raises:
        FileExistsError: something else is there.
    """
    marker = folder / "build.toml"
    if folder.exists():
        names = {path.name for path in folder.iterdir()}
        ours = "build.toml" in names and f'name = "{NAME}"' in marker.read_text()
        if names and not (ours and names <= {"build.toml", *FOLDERS}):
            raise FileExistsError(f"{folder} is neither empty nor an earlier repository of {NAME}")
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(BUILD)
    package = ROOT / "kernels"
    files = sorted(path for ext in ("json", "py") for path in package.rglob(f"*.{ext}"))
    contents = {path.relative_to(package).as_posix(): path.read_bytes() for path in files}
    digests = {name: hashlib.sha256(content).digest() for name, content in contents.items()}
    whole = hashlib.sha256(json.dumps([*contents, *(value.hex() for value in digests.values())]).encode())
    _write(folder / "torch-ext" / NAME, contents)
    for backend in BACKENDS:
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{whole.hexdigest()[:10]}",
            "version": VERSION,
            "license": "mit",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {name: base64.b64encode(value).decode() for name, value in digests.items()},
            },
        }
        description = json.dumps(metadata, indent=2).encode()
        _write(folder / "build" / f"torch-{backend}", {**contents, "metadata.json": description})


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "hub", metavar="FOLDER")
    target = parser.parse_args().folder
    try:
        write(target)
    except OSError as error:
        sys.exit(f"{error}")
    print(f"wrote {target}")
