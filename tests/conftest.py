import os
from contextlib import contextmanager

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same on every machine; GPUs: experiments/check_triton.py
os.environ["TRITON_INTERPRET"] = "1"     # before any package imports Triton, whose own functions are defined there

import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors of the tests are so small that threads would only wait for each other


@contextmanager
def stop_after(n):
    """Stands in for train_gpt.interrupts: Ctrl-C arrives during step n."""
    class Received(list):
        seen = 0

        def __len__(self):
            self.seen += 1
            return int(self.seen >= n)
    yield Received()
