"""The steps that delivery.py lists: of images (`image_steps`), of a stack (`stack_steps`), the smoke test
(`smoke_test`), the renewal of MLflow (`renewal`); their output for GitHub (`github`), the programs that they run
(`commands`)."""
