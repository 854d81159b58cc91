"""The stack, as a table of contents: what is asked for, what is there, what follows from both."""

import access
import credentials
import monitoring
import network
import outputs
import pulumi
import server
import settings
import storage
import survey
import user_data

config, mistakes = settings.read()
aws = access.provider(config)
found, refusals = survey.look(config, aws)
wrong = mistakes + refusals or user_data.problems(config, found.image)
if wrong:
    raise pulumi.RunError(settings.as_sentences(wrong))
for caution in settings.cautions(config) + user_data.cautions(config, found.image):
    pulumi.log.warn(caution)
pulumi.log.info(survey.outlook(found))
if config.restore_from:
    pulumi.log.info(survey.restoring(config))

here = pulumi.ResourceOptions(provider=aws)
net = network.build(config, found.zones, here)
kept = storage.build(config, found, here)
parameters = credentials.build(config, here)
role = access.role(config, kept, parameters, here)
machine = server.launch(config, found, net, kept, parameters, role, here)
monitoring.alarms(config, kept, here)
outputs.export(config, found, net, kept, parameters, machine)
