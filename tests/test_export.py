"""Models for other programs: which of a run's models is written, its card, the hub's calls, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import yaml

from kd_jax import export
from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.report import about_run
from tests.lm.report.test_page import make_rows, make_run


@pytest.fixture(scope="module")
def model():
    architecture = model_lib.PRESETS["tiny"]
    return model_lib.Model(architecture, model_lib.init(jax.random.key(0), architecture), (2,))


@pytest.fixture
def run(tmp_path, model):
    """A run whose student tau-0.8/seed-1 is there, as it looks once it was moved."""
    place = "stages/tau-0.8/seed-1-0123abcd"
    rows = [row | {"sample_temperature": 1.0} for row in make_rows(seeds=2, taus=(0.8,)) if row["kind"] == "evaluation"]
    rows = [row | {"source": f"/elsewhere/{place}"} if row["name"] == "tau-0.8/seed-1" else row for row in rows]
    folder = make_run(tmp_path / "run", rows, git_commit="abc|def")
    config = {
        "experiment": "lm", "num_train": 96, "p_star": {"source": "org/p-star"}, "sampling": {"max_length": 16},
        "student": {"width": 32, "source": "org/start@v1.0"}, "train": {"learning_rate": 0.002, "frozen": None},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights.save(model, folder / place / "model")
    return folder


def exported(*words):
    return export.main(["export", *map(str, words)])


def test_a_student_of_a_run_with_its_card(run, tmp_path, model, capsys):
    out = tmp_path / "out"
    assert exported(run, out, "--student", "tau-0.8/seed-1") == 0
    assert f"model: {out}" in capsys.readouterr().out
    got = weights.load(out)
    jax.tree.map(np.testing.assert_array_equal, got.params, model.params)
    text = (out / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "transformers" and head["base_model"] == "org/start"
    for part in ("# tau-0.8/seed-1 of run", "the teacher's text at tau = 0.8", "the model `org/p-star`; 96 sequences",
                 "| `train.learning_rate` | `0.002` |", "| tau-0.8/seed-1 | 1 |", "| direct/seed-1 | 1 |", "± 0.030",
                 "abc|def", f'from_pretrained("{out}")', "has no tokenizer", "arXiv:2505.13111"):  # fmt: skip
        assert part in text, part
    assert "train.frozen" not in text  # it is not set
    # an export is replaced on request, and nothing else is
    assert exported(run, out, "--student", "tau-0.8/seed-1") == 2 and "is not empty" in capsys.readouterr().err
    assert exported(run, out, "--student", "tau-0.8/seed-1", "--overwrite") == 0
    (out / "notes.txt").write_text("mine")
    assert exported(run, out, "--student", "tau-0.8/seed-1", "--overwrite") == 2
    assert "has other files too (notes.txt)" in capsys.readouterr().err


def test_each_teacher_has_a_card_of_its_own_numbers(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("arm") != "teacher"]
    own = {**next(row for row in rows if row["arm"] == "direct"), "arm": "teacher", "tau": 0.8}
    for number, name in ((0, "teacher/tau-0.8"), (1, "teacher/teacher-1/tau-0.8")):
        rows.append({**own, "name": name, "teacher": number, "source": f"/there/teacher-{number}"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in ((0, "teacher"), (1, "teacher/teacher-1")):
        found = about_run.exported(run, name)
        assert found.source == f"/there/teacher-{number}"
        assert f"teacher-{1 - number}/" not in str(found.card) and str(found.card).count("/tau-0.8") == 1
        assert "as a teacher. It learnt p*'s text" in found.card.summary
    config = json.loads((run / "config.json").read_text()) | {"teacher": {"source": "org/big"}}
    (run / "config.json").write_text(json.dumps(config))
    assert about_run.exported(run, "teacher").card.summary.startswith("The model `org/big` as it is")


@pytest.mark.slow
def test_a_checkpoint_that_belongs_to_no_run(tmp_path, model):
    weights.save(model, tmp_path / "mine")
    assert exported(tmp_path / "mine", tmp_path / "out", "--dtype=bfloat16") == 0
    assert str(weights.load(tmp_path / "out", dtype="bfloat16").params["embedding"].dtype) == "bfloat16"
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert "A copy of `" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


class Hub:
    """In place of huggingface_hub.HfApi: there is no hub here."""

    calls: list = []

    def whoami(self):
        self.calls.append(("whoami",))

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload_folder", repo_id, folder_path))


@pytest.mark.slow
def test_push_asks_for_the_token_first_and_uploads_the_folder(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    weights.save(model, tmp_path / "mine")
    out = tmp_path / "out"
    assert exported(tmp_path / "mine", out, "--push", "me/tiny", "--private") == 0
    assert Hub.calls == [
        ("whoami",), ("create_repo", "me/tiny", True, True), ("upload_folder", "me/tiny", str(out)),
    ]  # fmt: skip
    assert "pushed: https://huggingface.co/me/tiny" in capsys.readouterr().out
    assert 'from_pretrained("me/tiny")' in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "run has no model ''; its models are direct/seed-0, tau-0.8/seed-0"),
        (["run", "--student", "tau-0.9/seed-0"], "has no model 'tau-0.9/seed-0'; its models are"),
        (["gmm"], "is a run of gmm; only language models can be exported"),
        (["mine", "--student", "a"], "--student is for a run folder"),
        (["nothing/here"], "nothing/here"),
        (["mine", "--private"], "--private has no effect without --push"),
        (["mine", "--push", "tiny"], "a repository is named user/name"),
        (["mine", "--push", "a b/c"], "Repo id"),
        (["mine", "--push", "me/tiny"], "the Hugging Face hub: "),
    ],
)
def test_faults_before_any_work(run, tmp_path, model, monkeypatch, capsys, words, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", _no_token)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gmm").mkdir()
    (tmp_path / "gmm/config.json").write_text('{"experiment": "gmm"}')
    weights.save(model, tmp_path / "mine")
    assert exported(words[0], tmp_path / "out", *words[1:]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_or_a_model_that_cannot_be_written_is_refused_before_the_weights_are_loaded(
    tmp_path, model, monkeypatch, capsys
):
    monkeypatch.setattr(weights, "load", None)
    capped = model._replace(architecture=dataclasses.replace(model.architecture, logit_softcap=30.0))
    for name, one in (("mine", model), ("capped", capped)):
        weights.save(one, tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for source, folder, said in (
        ("mine", "notes", "has other files too (notes.txt)"),
        ("mine", "notes/notes.txt/out", "notes.txt is a file"),
        ("capped", "out", "a llama config.json cannot express this model's logit_softcap"),
    ):
        assert exported(tmp_path / source, tmp_path / folder, "--overwrite") == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write everywhere
    assert exported(tmp_path / "mine", tmp_path / "out") == 2
    assert f"{tmp_path} cannot be written to" in capsys.readouterr().err and not (tmp_path / "out").exists()


def _no_token(self):
    raise OSError("Token is required")


@pytest.mark.parity
def test_transformers_loads_the_folder_with_equal_logits(run, tmp_path, model):
    import torch
    from transformers import AutoModelForCausalLM

    assert exported(run, tmp_path / "out", "--student", "tau-0.8/seed-1") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = np.array([[1, 5, 9, 2]])
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    hidden = model_lib.forward(model.params, model.architecture, ids)
    ours = model_lib.logits(model.params, model.architecture, hidden)
    np.testing.assert_allclose(ours, logits, atol=1e-4)
