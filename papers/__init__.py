"""What papers claim, as configurations with a source for every number and checks of what our own runs show."""
