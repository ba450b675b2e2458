"""A teacher with another vocabulary, from config to report."""

import functools
import json
import re
import subprocess

import pytest

from configs import lm_two_vocabularies as two
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import weights
from kd_jax.lm.distill import alignment, reencoded
from kd_jax.lm.experiment import chain, checks, roles
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs import cache, stages
from kd_jax.runs.settings import freeze
from kd_jax.storage.files import read_rows
from tests.lm.experiment.test_chain import command, kill_in, numbers
from tests.lm.weights.checkpoints import write_folder

SMOKE = "configs/lm_two_vocabularies.py:smoke"


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """The smoke config writes its models into the cache; compiled programs stay in the common one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache.folder("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("KD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def spec_of(arg="smoke", **changes):
    config = two.get_config(arg)
    for key, value in changes.items():
        *groups, name = key.split(".")
        functools.reduce(getattr, groups, config)[name] = value
    return freeze(LmSpec, config)


@pytest.mark.parametrize("arg", ["smoke", "reverse,smoke"])
def test_the_smoke_config_is_valid_and_its_vocabularies_differ(arg):
    spec = spec_of(arg)
    chain.validate(spec)
    checks.check_sources(spec)
    assert re.match(r"the teacher has 1[56] ids and p\* 1[56]: another vocabulary", roles.other_vocabulary(spec))


@pytest.mark.parametrize("arg", ["", "reverse"])
def test_the_real_pair_is_valid(arg):
    chain.validate(spec_of(arg))


def test_keys_of_stages():
    """Only what goes through text depends on p*'s vocabulary, and nothing does where there is one vocabulary."""

    def folders(*arguments, **changes):
        return stages.folders("w", chain.plan(spec_of(**changes), "p*", *arguments))

    one, other = folders(), folders(True)
    assert {name for name in one if one[name] != other[name]} == {"samples/tau-0.8", *(
        name for name in one if name.startswith("tau-0.8"))}  # fmt: skip
    # of uld, a divergence has no effect
    kinds = [folders(**{"arms.aligned.vocabulary": kind})["aligned/seed-0"] for kind in ("aligned", "uld")]
    assert len(set(kinds)) == 2
    with pytest.raises(ValueError, match="uld.divergence has no effect"):
        chain.validate(spec_of(**{"arms.uld.divergence": "reverse_kl", "arms.aligned.divergence": "reverse_kl"}))


@pytest.mark.parametrize("changes, message", [
    ({"arms.uld.vocabulary": "same"}, "uld: the vocabulary of config.teacher.source=.*/ends is not that of "
     "config.p_star.source=.*/words .*Choose vocabulary='aligned' or 'uld'"),
    ({"sampling.prompts": ("templates",), "sampling.max_length": 128}, "config.sampling.prompts needs a teacher that"),
    ({"sampling.max_length": 512}, "positions"),
    ({"teacher.source": "plain"}, "config.teacher.source .* has no tokenizer, which another vocabulary needs"),
])  # fmt: skip
def test_faults_before_any_work(tmp_path, changes, message):
    if changes.get("teacher.source"):
        changes = {"teacher.source": str(write_folder(tmp_path / "plain"))}
    with pytest.raises(ValueError, match=message):
        chain.run(spec_of(**changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.long
def test_from_config_to_report_and_after_kills(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    planned = subprocess.run([*command(straight, SMOKE), "--dry_run"], capture_output=True, text=True)
    assert planned.returncode == 0 and "aligned/seed-0" in planned.stdout, planned.stderr[-2000:]
    done = subprocess.run(command(straight, SMOKE), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("samples/tau-0.8: ", "aligned/seed-0: ", "uld/seed-0: "):
        kill_in(killed, words, SMOKE)
    done = subprocess.run(command(killed, SMOKE), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(killed) == numbers(straight)

    rows = read_rows(straight / "metrics.jsonl")
    evaluated = {row["name"]: row for row in rows if row["kind"] == "evaluation"}
    # a teacher that knows other tokens has no probability of p*'s
    assert set(evaluated) == {f"{arm}/seed-0" for arm in ("direct", "tau-0.8", "aligned", "uld")}
    assert all(row["precision"] < 0 and row["recall"] < 0 for row in evaluated.values())
    assert evaluated["aligned/seed-0"]["distill"]["vocabulary"] == "aligned"
    assert "divergence" not in evaluated["uld/seed-0"]["distill"]
    trained = [row for row in rows if row["kind"] == "training" and row["arm"] in ("aligned", "uld")]
    assert trained and all(0 < row["compared"] <= 1 and row["divergence"] > 0 for row in trained)

    # the students' corpus is the text of the teacher's
    (folder,) = (straight / "stages" / "samples").glob("tau-0.8-*")
    ours, theirs = (weights.describe(two.tiny_model(name)) for name in two.MERGES)
    drawn, corpus = (corpus_lib.open(folder / part / "corpus") for part in ("teachers_ids", ""))
    assert drawn.manifest["settings"]["prompt_ids"] == [theirs.bos_id, *theirs.tokenizer.encode("be")]
    for ids, new in zip(drawn.rows().tokens, corpus.rows().tokens, strict=True):
        texts = [b"".join(alignment.pieces(model.tokenizer, row)) for model, row in ((theirs, ids), (ours, new))]
        assert alignment.readable(texts[0], ours.tokenizer).text.encode().startswith(texts[1])
    counts = json.loads((folder / "stage.json").read_text())["result"]["reencoded"]
    assert counts == corpus.manifest["reencoded"] and tuple(counts) == reencoded.COUNTS
    assert counts["invalid_bytes"] > 0 and counts["cut_rows"] > 0
    page = (straight / "report.html").read_text()
    assert "The text of a teacher with another vocabulary" in page and f"<td>{counts['invalid_bytes']}</td>" in page
    shown = {row["name"] for row in read_rows(straight / "samples.jsonl")}
    assert "samples/tau-0.8" in shown
