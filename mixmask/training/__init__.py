"""What every training stage shares: the loop kit, processes, optimisers, progress."""
