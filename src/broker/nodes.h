// NUMA nodes for the broker, by libnuma. Where it is built without, or the kernel knows no nodes, there is a reason why not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ksmu::broker::nodes {

// Null: nodes can be kept apart here.
const char* WhyNot();
// Whether the machine has it.
bool Has(std::uint32_t node);
// Of a shared mapping of a memfd: what is written to that part of the file, by whomever, is taken from the node as long as it
// has any. Not "or not at all" (MPOL_BIND): members' own copies, made at the first write to a merged page, follow the file's
// policy too, and where the node is full the kernel would look for somebody to kill.
int Prefer(void* start, std::size_t bytes, std::uint32_t node);
// Where a page of such a mapping lies, which has been written; -1: that cannot be told.
int NodeOf(const std::byte* page);

}  // namespace ksmu::broker::nodes
