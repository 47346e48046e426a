"""For all tests, before torch is loaded."""

import multiprocessing
import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads sleep while they wait, as in the commands
os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits are equal only for the same number of threads
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    # transformers copies remote code into this folder while another process may load it
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
# What the processes that tests fork have loaded already.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["transformers_radio.training.train", "transformers_radio.evaluation.classification.zero_shot_task"]
)
