"""What is preferred: pairs and prompts from the Hub, files, the testbed, a constitution or rejection sampling."""
