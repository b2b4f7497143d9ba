"""Other people's AlexNets: their tensors in this network's names and layout."""
