from contextlib import contextmanager

import torch

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
