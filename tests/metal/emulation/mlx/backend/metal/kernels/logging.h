// Nothing that is run here logs.
#pragma once
