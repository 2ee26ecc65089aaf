"""The scan of a victim as a defence: it judges the model, and no text."""

from pathlib import Path
from typing import Any

from models.errors import DataError
from models.offline.io.classifiers import load_classifier
from models.offline.scanning.scan import scan
from models.offline.study.cache import StepCache, digest_of
from models.offline.study.experiment import Experiment
from models.offline.study.recipe import ScanRecipe


def scan_victim(cache: StepCache, recipe: ScanRecipe, experiment: Experiment) -> dict[str, Any]:
    """Scan the victim of a cell; return what its row keeps of the report, or why it was refused.

    No text is kept: an example of a phrase is made of clean texts.
    """
    texts = [sample.text for sample in experiment.train[: recipe.texts]]

    def make(folder: Path) -> object:
        model, tokenizer = load_classifier(str(experiment.victim.folder / "model"))
        try:
            report = scan(
                model, tokenizer, texts, name="victim", minutes=recipe.minutes, seed=experiment.seed
            )
        except DataError as error:
            return {"refused": str(error), "classes": [], "search": {"seconds": 0.0}}
        return {
            "classes": [one.model_dump(exclude={"phrase": {"example"}}) for one in report.classes],
            "search": report.search.model_dump(exclude={"not_searched"}),
        }

    settings = {"texts": digest_of(texts), "minutes": recipe.minutes, "seed": experiment.seed}
    step = cache.step("scan", {"victim": experiment.victim.key, **settings}, make)
    return {**step.result, "targets": sorted(set(experiment.targets))}
