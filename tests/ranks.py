"""How a rank of a test ends."""

import torch.distributed as dist


def leave():
    """Destroy the process groups once all ranks are here.

    torch keeps the default group's threads for as long as a mesh of it is in its caches, and one that frees the tensor
    of its last message while Python shuts down aborts the process. A barrier of that group would take over what is
    still to be freed; one of a new group holds no tensor, and gives those threads the time that they need.
    """
    dist.barrier(dist.new_group(backend="gloo"))
    dist.destroy_process_group()
