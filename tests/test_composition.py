"""Every YAML file on disk composes into a checked configuration, and what a user mistypes is a named ConfigError."""

import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from kd.composition import check_folders, conf_dir, explain, register_schemas, to_config
from kd.config import (
    AdapterConfig,
    ArithmeticDataConfig,
    Config,
    DPOConfig,
    EmbeddedTeacherConfig,
    ExampleFilesConfig,
    GRPOConfig,
    HubDataConfig,
    HubTeacherConfig,
    InstructionsDataConfig,
    IntegerConfig,
    LocalTeacherConfig,
    LoRAConfig,
    ModelConfig,
    ORPOConfig,
    PreferencesDataConfig,
    PretrainConfig,
    QuantizationConfig,
    SFTConfig,
    StdlibDataConfig,
    TeacherConfig,
    TextDataConfig,
    TrainingConfig,
)
from kd.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
HELP = (CONF / "hydra/help/kd.yaml").read_text()
GROUPS = ("model", "train", "data", "teacher", "adapter", "quantization")
OPTIONS = [(path.parts[0], path.stem) for path in FILES if len(path.parts) == 2]
LAUNCHERS = ("submitit", "slurm")
CLASSES: dict[tuple[str, str], type] = {
    ("train", "quick"): TrainingConfig,
    ("train", "distill"): TrainingConfig,
    ("train", "pretrain"): PretrainConfig,
    ("data", "stdlib"): StdlibDataConfig,
    ("data", "text"): TextDataConfig,
    ("data", "hub"): HubDataConfig,
    ("data", "wiki_zh"): HubDataConfig,
    ("train", "sft"): SFTConfig,
    ("train", "dpo"): DPOConfig,
    ("train", "orpo"): ORPOConfig,
    ("train", "grpo"): GRPOConfig,
    ("data", "instructions"): InstructionsDataConfig,
    ("data", "preferences"): PreferencesDataConfig,
    ("data", "arithmetic"): ArithmeticDataConfig,
    ("data", "examples"): ExampleFilesConfig,
    ("teacher", "embedded"): EmbeddedTeacherConfig,
    ("teacher", "hub"): HubTeacherConfig,
    ("teacher", "qwen2_5_0_5b"): HubTeacherConfig,
    ("teacher", "local"): LocalTeacherConfig,
    ("teacher", "none"): TeacherConfig,
    ("adapter", "none"): AdapterConfig,
    ("adapter", "lora"): LoRAConfig,
    ("quantization", "none"): QuantizationConfig,
    ("quantization", "int8"): IntegerConfig,
    ("quantization", "int4"): IntegerConfig,
}
CORPUS_COMPANIONS = {
    # A pretrained teacher's vocabulary is known only later, so any model goes with one.
    "model": ["teacher=qwen2_5_0_5b"],
    "data": ["model=student_120m", "teacher=qwen2_5_0_5b"],
    "teacher": ["data.tokenizer=bpe", "train.alpha=0"],
}
EXAMPLE_COMPANIONS = {
    ("train", "sft"): ["data=instructions"],
    ("train", "dpo"): ["data=preferences"],
    ("train", "orpo"): ["data=preferences"],
    ("train", "grpo"): ["data=arithmetic"],
    ("data", "instructions"): ["train=sft"],
    ("data", "preferences"): ["train=orpo"],
    ("data", "arithmetic"): ["train=grpo"],
    ("data", "examples"): ["train=dpo"],
    ("debug", "fast_examples"): ["train=sft", "data=instructions"],
}


def companions(group: str, option: str) -> list[str]:
    """Return what an option needs beside it."""
    if (group, option) in EXAMPLE_COMPANIONS:
        return [*EXAMPLE_COMPANIONS[group, option], "init_from=given"]
    return CORPUS_COMPANIONS.get(group, [])


def composed(*overrides: str, with_hydra: bool = False) -> DictConfig:
    """Return what Hydra makes of a command line."""
    register_schemas()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def config_of(*overrides: str) -> Config:
    """Return a command line's configuration, or raise as the entry point would."""
    try:
        return to_config(composed(*overrides))
    except Exception as error:
        ours = explain(error)
        if ours is None:
            raise
        raise ours from error


def required_values(path: Path, prefix: str) -> list[str]:
    """Return overrides for what a file leaves to be given."""
    values = OmegaConf.load(CONF / path)
    assert isinstance(values, DictConfig)
    return [f"{prefix}.{key}=given" for key in map(str, values) if OmegaConf.is_missing(values, key)]


# --- every file -------------------------------------------------------------------------------------------------


def test_every_file_is_known_to_these_tests() -> None:
    known = {Path(group, f"{option}.yaml") for group, option in OPTIONS}
    known |= {Path("config.yaml"), Path("hydra/help/kd.yaml"), Path("hydra/job_logging/kd.yaml")}
    known |= {Path(f"hydra/launcher/{name}.yaml") for name in LAUNCHERS}
    known |= {Path("debug/teacher/fast_embedded.yaml")}
    assert set(FILES) == known
    assert {group for group, _ in OPTIONS} == {*GROUPS, "experiment", "sweep", "debug"}


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in GROUPS])
def test_a_group_option_gives_its_checked_class(group: str, option: str) -> None:
    given = required_values(Path(group, f"{option}.yaml"), group)
    config = config_of(f"{group}={option}", *companions(group, option), *given)
    expected = ModelConfig if group == "model" else CLASSES[group, option]
    assert type(getattr(config, group)) is expected


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] not in GROUPS])
def test_an_experiment_a_sweep_or_a_debug_option_composes(group: str, option: str) -> None:
    assert isinstance(config_of(f"{group}={option}", *companions(group, option)), Config)


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "sweep"])
def test_every_point_of_a_sweep_composes(option: str) -> None:
    params = composed(f"sweep={option}", with_hydra=True).hydra.sweeper.params
    columns = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()]
    points = list(itertools.product(*columns))
    assert len(points) > 1
    values = composed()
    for point in points:
        to_config(OmegaConf.merge(values, OmegaConf.from_dotlist(list(point))))  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("hydra_plugins") is not None, reason="launchers are installed")
@pytest.mark.parametrize("name", [*LAUNCHERS, "joblib"])
def test_a_launcher_that_is_not_installed_names_its_extra(name: str) -> None:
    with pytest.raises(ConfigError, match=r"kd-train\[s"):
        config_of(f"hydra/launcher={name}")


def test_the_sweep_is_the_specified_grid() -> None:
    hydra = composed("sweep=alpha_temperature", with_hydra=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    assert dict(hydra.sweeper.params) == {"train.alpha": "0,0.3,0.5,0.7,1", "train.temperature": "1,2,4"}


def test_hydra_uses_our_help_and_logging_and_keeps_out_of_the_run() -> None:
    hydra = composed(with_hydra=True).hydra
    assert hydra.runtime.choices["hydra/help"] == "kd"
    assert hydra.runtime.choices["hydra/job_logging"] == "kd"
    assert hydra.job_logging.root.handlers == ["console"]
    assert hydra.output_subdir is None
    assert hydra.run.dir == "."


@pytest.mark.parametrize(
    "override",
    ["hydra.job.chdir=true", "hydra.run.dir=x", "hydra.output_subdir=.hydra", "hydra.sweep.subdir=${hydra.job.num}"],
)
def test_folders_of_hydra_are_refused_by_their_key(override: str) -> None:
    key, value = override.split("=", 1)
    with pytest.raises(ConfigError, match=f"{re.escape(key)}=(?i:{re.escape(value)}) is not supported"):
        check_folders(composed(override, with_hydra=True))


def in_own_folder(tmp_path: Path, group: str, text: str) -> str:
    """Write `group`/own.yaml into a folder of a user's; return the override that adds the folder."""
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_text(text)
    return f"hydra.searchpath=[file://{tmp_path}]"


PARTIAL = "hidden_size: 64\nnum_layers: 1\nnum_heads: 2\nnum_kv_heads: 1\nintermediate_size: 128\n"


def test_a_model_file_that_leaves_out_a_part_of_the_shape_does_not_get_another_job_s(tmp_path: Path) -> None:
    folder = in_own_folder(tmp_path, "model", PARTIAL)
    with pytest.raises(ConfigError) as caught:
        config_of(folder, "model=own")
    message = str(caught.value)
    assert message.startswith("model.vocab_size, model.max_seq_len, model.rope_theta must be given"), message
    assert "model.vocab_size=151936 model.max_seq_len=512 model.rope_theta=1000000.0" in message
    given = config_of(folder, "model=own", "model.vocab_size=600", "model.max_seq_len=64", "model.rope_theta=1e4")
    assert given.model == ModelConfig(64, 1, 2, 1, 128, vocab_size=600, max_seq_len=64, rope_theta=1e4)


def test_a_model_file_may_begin_with_another(tmp_path: Path) -> None:
    folder = in_own_folder(tmp_path, "model", "defaults: [tiny, _self_]\nhidden_size: 64\n")
    assert config_of(folder, "model=own").model == replace(config_of().model, hidden_size=64)


def test_a_teacher_file_says_its_model_s_whole_shape(tmp_path: Path) -> None:
    text = "defaults: [/schema/teacher_embedded@_here_, _self_]\nmodel: {hidden_size: 64, num_layers: 1}\n"
    folder = in_own_folder(tmp_path, "teacher", text)
    with pytest.raises(ConfigError, match=r"^teacher\.model\.num_heads, .*teacher\.model\.vocab_size=151936"):
        config_of(folder, "teacher=own")


def test_the_scratch_of_a_sweep_may_be_chosen_and_what_is_said_twice_is_allowed() -> None:
    given = ["hydra.sweep.dir=x/${now:%Y}", "hydra.job.chdir=false", "hydra.run.dir=.", "hydra.output_subdir=null"]
    check_folders(composed(*given, with_hydra=True))


def test_the_default_is_the_embedded_job() -> None:
    config = config_of()
    assert type(config.train) is TrainingConfig
    assert type(config.data) is StdlibDataConfig
    assert type(config.teacher) is EmbeddedTeacherConfig
    assert type(config.teacher.model) is ModelConfig
    assert type(config.teacher.train) is PretrainConfig
    assert (config.name, config.seed, config.device, config.threads) == ("default", 0, "auto", None)
    assert (config.init_from, config.overwrite, config.tracker) == (None, False, "none")


def test_the_experiment_is_the_specified_job() -> None:
    config = config_of("experiment=qwen_wiki_zh")
    assert config.model == ModelConfig()
    assert config.train == TrainingConfig()
    assert config.data == HubDataConfig(path="wikimedia/wikipedia", name="20231101.zh")
    assert config.teacher == HubTeacherConfig(model_id="Qwen/Qwen2.5-0.5B", dtype="auto")
    assert config.name == "qwen_wiki_zh"


@pytest.mark.parametrize("data", [[], ["data=text", "data.path=mine"], ["model.vocab_size=5000"]], ids=str)
def test_debugging_trains_a_teacher_of_seconds_whatever_the_data(data: list[str]) -> None:
    teacher = config_of("debug=fast", *data).teacher
    assert isinstance(teacher, EmbeddedTeacherConfig)
    assert teacher.train.max_steps == 20
    assert teacher.model.hidden_size * teacher.model.num_layers <= 64
    assert config_of("debug=fast", "teacher.train.max_steps=4", *data).teacher.train.max_steps == 4  # type: ignore[attr-defined]


def test_debugging_leaves_other_teachers_and_other_runs_as_they_are() -> None:
    assert config_of("debug=fast", "experiment=qwen_wiki_zh").teacher == config_of("experiment=qwen_wiki_zh").teacher
    teacher = config_of().teacher
    assert isinstance(teacher, EmbeddedTeacherConfig)
    assert (teacher.model.hidden_size, teacher.model.num_layers, teacher.train.max_steps) == (192, 4, 1000)


def test_values_of_the_command_line_win_and_are_typed() -> None:
    config = config_of("train.alpha=1", "train.temperature=4", "experiment=qwen_wiki_zh", "data.seq_len=64", "seed=7")
    assert isinstance(config.train, TrainingConfig)
    assert isinstance(config.train.alpha, float)
    assert (config.train.alpha, config.train.temperature) == (1.0, 4.0)
    assert (config.data.seq_len, config.seed) == (64, 7)


# --- what a user mistypes ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key": (["train.alpa=1"], ["train.alpa ", "train.alpha?"]),
    "misspelt key with +": (["+train.alpa=1"], ["train.alpa ", "train.alpha?"]),
    "misspelt key with ++": (["++train.alpa=1"], ["train.alpa ", "train.alpha?"]),
    "misspelt group": (["modle=tiny"], ["modle ", "model?"]),
    "misspelt nested key": (["teacher.model.hidden=8"], ["teacher.model.hidden ", "hidden_size"]),
    "misspelt nested key with +": (["+teacher.model.hidden=8"], ["teacher.model.hidden ", "hidden_size"]),
    "unknown root key": (["+extra.deep=1"], ["extra "]),
    "another trainer's knob": (["train=pretrain", "train.alpha=1"], ["train.alpha "]),
    "another corpus's key": (["data.path=x"], ["data.path "]),
    "word for an integer": (["train.batch_size=many"], ["train.batch_size", "many", "Integer"]),
    "fraction for an integer": (["train.batch_size=2.5"], ["train.batch_size", "2.5", "Integer"]),
    "word for a number": (["train.alpha=half"], ["train.alpha", "half", "Float"]),
    "boolean for a number": (["train.alpha=true"], ["train.alpha", "Float"]),
    "null for a number": (["train.alpha=null"], ["train.alpha"]),
    "list for a number": (["seed=[1]"], ["seed", "Integer"]),
    "word for a boolean": (["overwrite=maybe"], ["overwrite", "maybe"]),
    "unknown interpolation": (["name=${nothing}"], ["name", "nothing"]),
    "missing text path": (["data=text"], ["data.path"]),
    "missing data set": (["data=hub"], ["data.path"]),
    "missing teacher directory": (["teacher=local"], ["teacher.path"]),
    "missing teacher id": (["teacher=hub"], ["teacher.model_id"]),
    "deleted group": (["~train"], ["train "]),
    "deleted teacher": (["~teacher"], ["~teacher", "teacher=none"]),
    "deleted model": (["~model"], ["model.vocab_size"]),
    "unknown model": (["model=huge"], ["model/huge", "tiny", "student_120m"]),
    "unknown trainer": (["train=ppo"], ["train/ppo", "distill", "pretrain"]),
    "unknown experiment": (["experiment=none_such"], ["experiment/none_such", "qwen_wiki_zh"]),
    "null for a group": (["teacher=null"], ["group", "NoneType"]),
    "number for a group": (["model=7"], ["group", "int"]),
    "several values": (["train.alpha=0,1"], ["train.alpha", "--multirun"]),
    "no value": (["train.alpha"], ["train.alpha is no key=value"]),
    "an equals sign in a value": (["data.path=x=y.txt"], ["data.path=x=y.txt", """'data.path="x=y.txt"'"""]),
    "a home folder": (["data.path=~/x"], ["""'data.path="~/x"'"""]),
    "letters beyond ASCII": (["data.path=\u6587.txt"], ["""'data.path="\u6587.txt"'"""]),
    "a launcher's setting without a launcher": (["hydra.launcher.n_jobs=2"], ["n_jobs", "hydra/launcher=joblib"]),
    "an empty choice": (["seed=choice()"], ["seed=choice()", "empty choice is not legal"]),
    "a path with brackets": (["data=text", "data.path=a(b).txt"], ["""'data.path="a(b).txt"'"""]),
    "out of range": (["train.alpha=2"], ["train.alpha=2"]),
    "out of range, nested": (["teacher.train.batch_size=0"], ["train.batch_size=0"]),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_mistake_is_a_config_error_that_names_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert caught.value.exit_code == 2
    assert "\n" not in message


@pytest.mark.parametrize(
    "value",
    ["x=y", "~/x", "\u6587", "a(1).txt", "it's=1", 'say "a=b"', "[a].txt", "b = c", "a\\\\b=c", "x=\\\\", "a:b=c"],
)
def test_the_quotes_that_a_refusal_proposes_give_the_value_as_it_stands(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(f"data.path={value}")
    *_, proposed = str(caught.value).partition("quote it twice: ")
    assert composed("data=text", *shlex.split(proposed)).data.path == value


def test_a_missing_configuration_is_named() -> None:
    register_schemas()
    with initialize_config_dir(conf_dir(), version_base="1.3"), pytest.raises(MissingConfigException) as caught:
        compose("nope")
    assert "'nope'" in str(explain(caught.value))


@pytest.mark.parametrize(
    ("data", "ratio"),
    [("text", 0.1), ("hub", 0.1), ("examples", 0.1), ("instructions", 0.1), ("stdlib", 0.1), ("wiki_zh", 0.0)],
)
def test_all_data_but_the_specified_have_a_test_part(data: str, ratio: float) -> None:
    assert composed(f"data={data}").data.test_ratio == ratio


def test_a_fault_of_the_code_is_not_explained_away() -> None:
    assert explain(ValueError("shapes differ")) is None
    assert explain(KeyError("x")) is None


def test_our_own_errors_stay_as_they_are() -> None:
    error = ConfigError("x")
    assert explain(error) is error


# --- around composition -----------------------------------------------------------------------------------------


def test_the_help_names_every_option_on_disk() -> None:
    listed = HELP.partition("Groups (choose with group=option):")[2].partition("\n\n")[0]
    named = {
        (line.split()[0], option.strip())
        for line in listed.splitlines()
        if line.strip()
        for option in line.split(maxsplit=1)[1].split("|")
    }
    assert named == set(OPTIONS)


def test_the_keys_that_the_help_sets_exist() -> None:
    commands = [line for line in HELP.splitlines() if "train.max_steps=" in line or "data.path=" in line]
    keys = set(re.findall(r"(?<![\w.])((?:train|data|teacher|model)\.\w+)=", "\n".join(commands)))
    assert {"train.max_steps", "data.path", "data.name"} <= keys
    known = {f"train.{key}" for key in composed().train} | {f"data.{key}" for key in composed("data=hub").data}
    assert keys <= known


def test_composition_and_checks_import_no_torch() -> None:
    program = (
        "import sys\n"
        "from hydra import compose, initialize_config_dir\n"
        "from kd.composition import check_folders, conf_dir, register_schemas, to_config\n"
        "register_schemas()\n"
        "with initialize_config_dir(conf_dir(), version_base='1.3'):\n"
        "    print(to_config(compose('config')).train.trainer)\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "distillation\n[]\n"
