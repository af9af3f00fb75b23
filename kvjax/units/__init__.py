"""Units of work: what other processes can do apart from each other, and the engines that run them."""
