// An error of the host, made in its place: GLMDDP_STANDIN_PLANT=WHAT:CALL:NUMBER[:A[:B]] changes the NUMBER-th call (from 1) of one kind as a host would
// have made it wrongly. Tests see whether it is found.
//
// CALL is `up` or `send` (to the device, from pageable or from pinned memory), `down`, `copy` (on the device), `fill`, `free`, `record`, `product SHAPE` or
// `launch KERNEL`. WHAT is one of
//   leave_out            it is not made
//   twice                it is made twice (launch, product)
//   elsewhere            it goes to another stream (all but down and record)
//   early                the host reads before the bytes are there (down)
//   touched              the host writes to the pinned source once more (send)
//   short                A bytes are missing at the end (up, send)
//   add                  B is added to the word of 8 bytes at byte A of the arguments (launch)
//   stale                that word is what it was in the first such call (launch)
//   swapped              the first two words of the arguments are each other's (launch)
//   freed                the memory that the word at byte A points to is freed before (launch)
//   grid                 A blocks more (launch)
//   leading              A is added to the first operand's leading dimension (product)
//   halves               operands are read as bfloat16, which they are not (product)
//   alpha, beta          A hundredths are the factor of the product, of what is added (product)
//   biased               the bias is added A times (product)
#pragma once
#include <string>

namespace plant {

struct Error {
    std::string what;
    long a, b;
    bool is(const char* name) const { return what == name; }
};

// The error of this call; without one, an error that is nothing.
const Error& at(const std::string& call);
// A stream that nothing orders with the host's.
void* elsewhere();

}  // namespace plant
