#!/usr/bin/env bash
# Optuna 5.0.0: a journal with a line that was cut short reads well, until two more writes make all of it unreadable.
#
# `JournalFileBackend` is made for processes that share a file, and passes over a last line without its end, as a full
# disk or a kill leaves one. So the journal looks healthy. But the next append, by any process, continues that line and
# is lost; after one more, reading raises an error for everybody, and trials before the damage cannot be loaded either.
# Cutting the rest of a line under the journal's lock, before each append, avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optuna==5.0.0 2>/dev/null
cat > "$folder/run.py" <<'PYTHON'
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)
path = sys.argv[1]


def trials() -> object:
    try:
        study = optuna.load_study(study_name="shared", storage=JournalStorage(JournalFileBackend(path)))
        return len(study.trials)
    except Exception as error:
        return type(error).__name__


study = optuna.create_study(study_name="shared", storage=JournalStorage(JournalFileBackend(path)))
study.tell(study.ask(), 1.0)
with open(path, "ab") as journal:
    journal.write(b'{"op_code":4,"wor')  # what fitted on the disk
print("cut short:", trials())
for _ in range(2):  # there is room again
    try:
        study.ask()
    except Exception as error:
        print("asking:", type(error).__name__)
    print("one write later:", trials())
PYTHON
said="$("$folder/venv/bin/python" "$folder/run.py" "$folder/study.journal" 2>/dev/null)"
expected="cut short: 1
one write later: 1
asking: JSONDecodeError
one write later: JSONDecodeError"
echo "$said"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
