"""The mathematics: each op is one public function and one file per backend. Knows tensors only."""
