"""Results in the form that the Hub's leaderboards read: `.eval_results/*.yaml` in the model's repository."""

from collections.abc import Iterator, Mapping, Sequence

import yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from transformers_radio.evaluation.result import Result, slug


def eval_result_files(results: Sequence[Result], benchmarks: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """(path in the repository, content) of a file per result on one of the benchmarks.

    Each metric is an entry: its value, the task (`task_id`, the name of our task, or TASK-METRIC where it has several
    metrics), and the protocol as its note.

    Args:
        benchmarks: name of the data in the results -> id of the same data set on the Hub.

    Raises:
        ValueError: no result is on such data, or an id is not one of the Hub.
        ImportError: huggingface_hub is older than this form.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    known = sorted({result.data for result in results})
    for data, dataset in benchmarks.items():
        if data not in known:
            raise ValueError(f"--eval-results {data}={dataset}: there is no result on {data!r}; they are on {known}.")
        try:
            validate_repo_id(dataset)
        except HFValidationError as error:
            raise ValueError(f"--eval-results {data}={dataset}: {dataset!r} is no id of a data set.") from error
    for result in results:
        if result.data not in benchmarks:
            continue
        entries = [
            EvalResultEntry(
                dataset_id=benchmarks[result.data],
                task_id=result.task if len(result.metrics) == 1 else f"{result.task}-{slug(name).lower()}",
                value=value,
                notes=result.protocol,
            )
            for name, value in result.metrics.items()
        ]
        content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        yield f"{EVAL_RESULTS_FOLDER}/{slug(f'{result.task} {result.data}')}.yaml", content.encode()
