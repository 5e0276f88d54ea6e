"""The picture of the demo has the last line of each step and the table, and no times."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOG = """`train_dataset`: 32 rows were looked at; all can be used.
Learn: policy  75/150  268 s  KL to the backbone 0.051
Learn: policy  150/150  574 s  KL to the backbone 0.0453
Evaluate after RL  300/300  11 s
 Reward on held-out questions (exact match,
│ all       │     0.630 │    0.983 │ +0.353 │
Report: outputs/demo/report.html
1019 s in all
"""


def test_the_last_line_of_each_step_is_drawn(tmp_path):
    (tmp_path / "demo.log").write_text(LOG, encoding="utf-8")
    words = ["examples/scripts/draw_demo.py", str(tmp_path / "demo.log"), "--output", str(tmp_path / "demo.svg")]
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)
    picture = (tmp_path / "demo.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    for shown in ("Learn: policy", "150/150", "KL to the backbone 0.0453", "Evaluate after RL", "0.983", "report.html"):
        assert shown in picture, shown
    for hidden in ("75/150", "574 s", "in all", "looked at"):
        assert hidden not in picture, hidden
