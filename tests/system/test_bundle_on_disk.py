"""Real services, while somebody writes into the bundle that they serve."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from models.bundle.layout import ACTIVATIONS
from models.engines.registry import is_installed
from tests.support.bundles import fit_tiny, some_texts
from tests.support.families import tiny_victim
from tests.support.servers import served

TEXTS = some_texts(8)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_what_is_written_into_a_served_bundle_changes_nothing(
    engine: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    if not is_installed(engine):
        pytest.skip(f"{engine} is not installed")
    bundle = fit_tiny(tiny_victim("bert"), tokenizer, tmp_path / "bundle", engine=engine)
    with served(bundle, ENGINE=engine, DTYPE="float32", MODE="shadow", ADMIN="true") as client:
        before = client.post("/classify", json={"inputs": TEXTS}).json()["results"]
        assert all(result["screen"] for result in before)
        weights = [ACTIVATIONS, "victim/model.safetensors"]
        for name in weights:  # in place: the size and the inode stay
            with (bundle / name).open("r+b") as file:
                header = 8 + int.from_bytes(file.read(8), "little")
                file.seek(header)
                file.write(bytes((bundle / name).stat().st_size - header))
        assert client.post("/classify", json={"inputs": TEXTS}).json()["results"] == before
        for name in weights:
            with (bundle / name).open("r+b") as file:
                file.truncate(0)
        assert client.post("/classify", json={"inputs": TEXTS}).json()["results"] == before
        assert client.post("/admin/reload").status_code == 422
        process = client.headers["x-server-pid"]
        assert str(bundle) not in Path(f"/proc/{process}/maps").read_text()
        shutil.rmtree(bundle)
        assert client.post("/classify", json={"inputs": TEXTS}).json()["results"] == before
