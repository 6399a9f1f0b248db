"""The examples that a configuration names, in the form that a trainer needs."""

from kd.config import (
    ArithmeticDataConfig,
    ExampleConfig,
    ExampleFilesConfig,
    InstructionsDataConfig,
    PreferencesDataConfig,
    StdlibDataConfig,
)
from kd.data.corpora import TRAIN, Corpus, read_corpus
from kd.data.embedded.arithmetic import arithmetic_answers, arithmetic_prompts
from kd.data.embedded.instructions import instruction_examples
from kd.data.embedded.mixture import mix_answers
from kd.data.embedded.preferences import preference_examples
from kd.data.example_files import AnswerCheck, read_answers, read_preferences, read_prompts
from kd.data.examples import ExampleSet, PreferenceExample, PromptExample, SftExample
from kd.errors import ConfigError


def answer_set(config: ExampleConfig) -> ExampleSet[SftExample]:
    """Return prompts with responses, for SFT.

    Raises:
        ConfigError: if the configuration names none.
        DataError: if its files cannot be read.
    """
    if isinstance(config, InstructionsDataConfig):
        instructions = instruction_examples(_stdlib(config), config.max_chars)
        additions = arithmetic_answers(arithmetic_prompts(config.digits, None, config.val_ratio, config.test_ratio))
        return mix_answers(instructions, additions, config.arithmetic_share)
    if isinstance(config, ArithmeticDataConfig):
        return arithmetic_answers(_additions(config))
    if isinstance(config, ExampleFilesConfig):
        ratios = config.val_ratio, config.test_ratio
        return read_answers(config.path, *ratios, val_path=config.val_path, test_path=config.test_path)
    raise _no_such_form(config, "prompts with responses")


def preference_set(config: ExampleConfig) -> ExampleSet[PreferenceExample]:
    """Return pairs of answers, for DPO and ORPO; errors as for `answer_set`."""
    if isinstance(config, PreferencesDataConfig):
        return preference_examples(instruction_examples(_stdlib(config), config.max_chars))
    if isinstance(config, ExampleFilesConfig):
        ratios = config.val_ratio, config.test_ratio
        return read_preferences(config.path, *ratios, val_path=config.val_path, test_path=config.test_path)
    raise _no_such_form(config, "pairs of answers")


def prompt_set(config: ExampleConfig, check_answer: AnswerCheck | None = None) -> ExampleSet[PromptExample]:
    """Return prompts with reference answers, for GRPO; errors as for `answer_set`.

    Args:
        config: Names the examples.
        check_answer: Raises DataError for an answer that the reward cannot compare with.
    """
    if isinstance(config, ArithmeticDataConfig):
        additions = _additions(config)
        if check_answer is not None:
            check_answer(additions.part(TRAIN)[0].answer)  # all are written alike
        return additions
    if isinstance(config, ExampleFilesConfig):
        return read_prompts(
            config.path,
            config.val_ratio,
            config.test_ratio,
            val_path=config.val_path,
            test_path=config.test_path,
            check_answer=check_answer,
        )
    raise _no_such_form(config, "prompts with reference answers")


def _additions(config: ArithmeticDataConfig) -> ExampleSet[PromptExample]:
    return arithmetic_prompts(config.digits, config.num_pairs, config.val_ratio, config.test_ratio)


def _stdlib(config: ExampleConfig) -> Corpus:
    """The embedded corpus, split as `data=stdlib` splits it: what is held out here was not read in pre-training."""
    return read_corpus(StdlibDataConfig(val_ratio=config.val_ratio, test_ratio=config.test_ratio))


def _no_such_form(config: ExampleConfig, form: str) -> ConfigError:
    return ConfigError(f"data is a {type(config).__name__}, which has no {form}.")
