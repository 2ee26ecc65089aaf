"""The table of versions in docs/upgrading.md says what the code does."""

import re
from typing import get_args

from alembic.script import ScriptDirectory

from models.bundle.manifest import Manifest
from service.settings import OTHER_VERSIONS
from tests.support.paths import ROOT
from tests.support.versions import ROWS

SCRIPTS = ScriptDirectory(str(ROOT / "service/audit/migrations"))


def test_the_first_row_is_the_code() -> None:
    (bundle,) = get_args(Manifest.model_fields["schema_version"].annotation)
    first = ROWS[0]
    assert (first.version, first.bundle, first.audit) == (
        "unreleased",
        str(bundle),
        SCRIPTS.get_current_head(),
    ), "change the first row of the table in docs/upgrading.md"


def test_versions_fall_and_name_schemas_that_are_there() -> None:
    numbers = [tuple(map(int, row.version.split("."))) for row in ROWS[1:]]
    assert numbers == sorted(set(numbers), reverse=True)
    for row in ROWS:
        assert row.audit == "-" or SCRIPTS.get_revision(row.audit)


def test_every_name_of_a_past_version_is_in_the_table() -> None:
    said = dict(re.findall(r"`(PSIM_\w+)` is `(PSIM_\w+)`", " ".join(r.settings for r in ROWS)))
    assert said == {old: new for old, new in OTHER_VERSIONS.items() if new}
