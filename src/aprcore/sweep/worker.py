"""One case of a sweep, from its files to its result, wherever it runs."""

from __future__ import annotations

import time
import traceback
import warnings
from pathlib import Path

from aprcore.ground.errors import AprError
from aprcore.runs.bisect import run
from aprcore.sweep.cases import Case, make_request
from aprcore.sweep.files import check_unchanged, is_url
from aprcore.sweep.results import CaseResult, error_result, summarise


def run_case(case: Case, cache: Path, threads: int) -> CaseResult:
    """Run a case; whatever is wrong with it is its result, and the other cases go on.

    Args:
        case: The case.
        cache: Where copies of what is behind a URL are kept.
        threads: Threads of the CPU path.
    """
    # A NaN or an overflow in a tensor is a finding and is reported as one.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="aprcore")
    started = time.perf_counter()
    try:
        report = run(make_request(case, cache, threads))
        for source in case.sources:
            if not is_url(source.location):
                # An engine's author may have rebuilt while it was read.
                check_unchanged(source.location, source.mark, is_model=source is case.model)
        return summarise(case.id, report, strict=case.settings.strict)
    except AprError as error:
        message = str(error)
    except MemoryError:
        message = "out of memory; try fewer tokens, layers or stages, or fewer jobs"
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        message = f"{where}{error.strerror or error}"
    except Exception as error:
        # A fault of ours in one case must not take hours of other cases with it.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        message = f"internal error: {type(error).__name__}: {error} ({place})"
    return error_result(case.id, message, elapsed_s=time.perf_counter() - started)
