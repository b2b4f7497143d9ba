"""Where images come from: folders, the official tars unopened, WebDatasets; their listing. May import storage."""
