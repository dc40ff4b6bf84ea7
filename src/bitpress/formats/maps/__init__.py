"""Maps: the changes of basis before and after the terms of a weight."""
