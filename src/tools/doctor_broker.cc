// ksmuctl doctor: is there a broker, and whose?
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "broker/door.h"
#include "broker/member.h"
#include "os/channel.h"
#include "tools/doctor.h"

namespace ksmu::tools {
namespace {

using broker::BrokerDoor;
using broker::Member;

std::string NameOf(std::uint32_t uid) {
  const passwd* const user = getpwuid(uid);
  return user ? user->pw_name + (" (" + std::to_string(uid) + ")") : "user " + std::to_string(uid);
}

std::string DirectoryOf(const std::string& path) { return path.substr(0, std::max<std::size_t>(path.rfind('/'), 1)); }

// The file and its directory, before anybody is spoken to: who can replace the socket can be the next broker.
bool IsStrangersPlace(const std::string& path, Finding* finding) {
  struct stat socket {}, directory {};
  if (lstat(path.c_str(), &socket) == 0 && !Member::IsTrusted(socket.st_uid)) {
    *finding = {"broker", Level::kProblem,
                path + " was made by a stranger, " + NameOf(socket.st_uid) +
                    ": only brokers of root, of oneself, and of users in " + Member::kTrustedFile + " are joined",
                "rm " + path + ", then ksmud --socket " + path + "; or, if it is to be trusted, as root: echo " +
                    std::to_string(socket.st_uid) + " >> " + Member::kTrustedFile};
    return true;
  }
  if (stat(DirectoryOf(path).c_str(), &directory) != 0) return false;
  const bool strangers = !Member::IsTrusted(directory.st_uid), open = (directory.st_mode & 0002) && !(directory.st_mode & S_ISVTX);
  if (!strangers && !open) return false;
  *finding = {"broker", Level::kWarning,
              DirectoryOf(path) + (strangers ? " is " + NameOf(directory.st_uid) + "'s" : " can be written by everybody") +
                  ": a stranger could put a socket there, which keeps programs from joining",
              "chmod o-w " + DirectoryOf(path) + (strangers ? "; or another --socket" : "")};
  return true;
}

Finding Look(const char* path, bool asked_for, const std::string& domain, bool* nobody) {
  Finding place{};
  const bool suspicious = IsStrangersPlace(path, &place);
  if (suspicious && place.level == Level::kProblem) return place;
  os::Channel channel;
  std::uint32_t user = 0;
  os::ErrorText why;
  const int error = Member::Reach(path, &channel, &user, &why);
  // A socket's name alone does not make a domain.
  const std::string start = domain.empty() ? std::string("ksmud --socket ") + path + " &" : "ksmud --domain " + domain + " &";
  const std::string service = domain.empty() ? "systemctl start ksmud" : "systemctl enable --now ksmud@" + domain + ".socket, and ksmud started anew,";
  *nobody = error == -ENOENT || error == -ECONNREFUSED;
  if (*nobody) {
    return {"broker", asked_for ? Level::kProblem : Level::kWarning,
            std::string(path) + ": " + why.text + (asked_for ? "" : ", so each process is merged by itself alone"),
            (asked_for ? start : std::string("ksmud &")) + ", or " + service + " where it is a service"};
  }
  if (error == -EPERM && user != 0) {
    return {"broker", Level::kProblem,
            std::string(path) + " is a stranger's broker, of " + NameOf(user) +
                ": only those of root, of oneself, and of users in " + Member::kTrustedFile + " are joined",
            "ksmud, as oneself or as root; or, if it is to be trusted, as root: echo " + std::to_string(user) + " >> " +
                Member::kTrustedFile};
  }
  if (error == -EACCES)
    return {"broker", Level::kProblem, std::string(path) + ": " + why.text,
            std::string("chmod or chgrp it: ls -l ") + path + "; ksmud --mode is for new ones"};
  if (error) return {"broker", Level::kProblem, std::string(path) + ": " + why.text, "another --socket; or " + start};
  if (suspicious) return place;
  return {"broker", Level::kOk, std::string(path) + ": " + NameOf(user) + " listens", ""};
}

}  // namespace

void CheckBroker(const std::string& socket, const std::string& domain, Findings* findings) {
  const char* const named = socket.empty() ? std::getenv("KSMU_BROKER") : socket.c_str();
  const char* const asked = domain.empty() ? std::getenv("KSMU_DOMAIN") : domain.c_str();
  BrokerDoor door;
  if (const char* wrong = door.Choose(named, asked, std::getenv("XDG_RUNTIME_DIR"))) {
    findings->push_back({"broker", Level::kProblem, wrong, "correct --socket and --domain, or KSMU_BROKER and KSMU_DOMAIN"});
    return;
  }
  const std::string in_domain = asked && !(named && *named) ? asked : "";
  if (!door.has_choice()) {
    findings->push_back({"broker", Level::kOk, "none is wanted (\"none\"): each process is merged by itself alone", ""});
    return;
  }
  // As the library: the first that is there.
  Finding first{};
  for (std::size_t i = 0; i < BrokerDoor::kCandidates && door.path(i)[0]; ++i) {
    bool nobody = false;
    const Finding finding = Look(door.path(i), door.asked_for(), in_domain, &nobody);
    if (i == 0 || !nobody) first = finding;
    if (!nobody) break;
  }
  findings->push_back(first);
}

}  // namespace ksmu::tools
