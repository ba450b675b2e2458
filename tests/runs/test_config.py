import json

import pytest

from kd_jax.runs import config as config_lib

CONFIG = """
from ml_collections import config_dict


def get_config():
    config = config_dict.ConfigDict()
    config.experiment = "gmm"
    config.seeds = 10
    config.rate = 0.5
    config.flag = True
    config.name = "a"
    config.sizes = (1, 2)
    config.betas = (0.5, 1.0)
    config.student = config_dict.ConfigDict({"components": 5})
    return config
"""


@pytest.fixture
def parse(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)

    def call(*words):
        return config_lib.parse(["train", f"--config={path}", f"--workdir={tmp_path / 'run'}", *words])

    return call


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--config.seeds=5", "seeds", 5),
        ("--config.rate=1", "rate", 1.0),
        ("--config.rate=1e-3", "rate", 1e-3),
        ("--config.flag=false", "flag", False),
        ("--noconfig.flag", "flag", False),
        ("--config.flag", "flag", True),
        ("--config.name=7", "name", "7"),
        ("--config.sizes=(3,4,5)", "sizes", (3, 4, 5)),
        ("--config.betas=(1,0.1)", "betas", (1, 0.1)),
        ("--config.student.components=3", "student.components", 3),
    ],
)
def test_override_sets_field_and_its_type(parse, word, key, value):
    got = config_lib.flatten(parse(word).config.to_dict())[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("--config.seeds=1e6", ["--config.seeds", "1e6"]),
        ("--config.seeds=100.0", ["--config.seeds", "100.0"]),
        ("--config.seeds=True", ["--config.seeds"]),
        ("--config.rate=fast", ["--config.rate", "fast"]),
        ("--config.rate", ["--config.rate"]),
        ("--config.flag=no", ["--config.flag"]),
        ("--config.sizes=(1.5,2)", ["--config.sizes", "1.5"]),
        ("--config.sizes[0]=3", ["--config.sizes[0]"]),
        ("--config.seds=3", ["--config.seds", "did you mean --config.seeds?"]),
        ("--config.student.componets=3", ["did you mean --config.student.components?"]),
        ("--config.components=3", ["did you mean --config.student.components?"]),
        ("--config.student=3", ["--config.student", "group"]),
        ("--overwite", ["did you mean --overwrite?"]),
        ("--workdri=x", ["did you mean --workdir?"]),
        ("--overwrite=maybe", ["--overwrite"]),
        ("--flagfile=absent.txt", ["absent.txt"]),
        ("stray", ["stray"]),
        ("--num_process=2", ["did you mean --num_processes?"]),
        ("--process_id=first", ["--process_id", "first"]),
        ("--initialization_timeout=0", ["--initialization_timeout"]),
    ],
)
def test_bad_flag_is_one_line_naming_it_and_exit_2(parse, word, parts, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse(word)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for part in parts:
        assert part in error
    assert not (tmp_path / "run").exists()


def test_flagfile_counts_wherever_it_stands(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "flags.txt").write_text("--config.seeds=3\n--overwrite\n")
    words = ["--config", str(tmp_path / "config.py"), "--workdir", "w", f"--flagfile={tmp_path / 'flags.txt'}"]
    args = config_lib.parse(["train", *words])
    assert args.config.seeds == 3 and args.overwrite and args.workdir == "w"


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_missing_flag_is_named(tmp_path, missing, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    words = {"config": f"--config={tmp_path / 'config.py'}", "workdir": "--workdir=w"}
    with pytest.raises(SystemExit) as stop:
        config_lib.parse(["train", *(word for name, word in words.items() if name != missing)])
    assert stop.value.code == 2 and f"--{missing}" in capsys.readouterr().err


def test_config_is_locked_and_plain(parse):
    config = parse().config
    with pytest.raises(AttributeError):
        config.seds = 3
    plain = config_lib.to_dict(config)
    assert plain["sizes"] == [1, 2] and json.loads(json.dumps(plain)) == plain


def test_absent_config_file_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        config_lib.parse(["train", "--config=absent.py", "--workdir=w"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--config" in error and "absent.py" in error


def test_processes_are_those_of_the_flags(parse):
    assert parse().processes == {"coordinator_address": None, "num_processes": None, "process_id": None}
    args = parse("--coordinator_address=a:1", "--num_processes=2", "--process_id=1", "--initialization_timeout=9")
    assert args.processes == {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert args.initialization_timeout == 9 and args.heartbeat_timeout == 60


def test_devices_are_for_dry_runs(parse, capsys):
    found = parse("--dry_run", "--device=8xH100", "--mfu=0.3", "--price_per_hour", "2.5")
    assert (found.device, found.mfu, found.price_per_hour) == ("8xH100", 0.3, 2.5)
    assert (parse().device, parse().mfu, parse().price_per_hour) == ("", 0.4, None)
    with pytest.raises(SystemExit):
        parse("--device=8xH100")
    assert "--dry_run" in capsys.readouterr().err
